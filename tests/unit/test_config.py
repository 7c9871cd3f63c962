"""SidpConfig: defaults, and one line that names the flag for whatever is wrong."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.config import (
    MODES,
    PLACEMENTS,
    POOLS,
    RESIDENCIES,
    SELF_CHECKS,
    SidpConfig,
    flag_name,
)
from sidp_sgl.errors import SidpUsageError


def refusal(**values: Any) -> str:
    with pytest.raises(SidpUsageError) as raised:
        SidpConfig.from_values(values)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("--sidp")
    return message


def test_defaults() -> None:
    config = SidpConfig.from_values({})
    assert config.as_dict() == {
        "sidp": False,
        "sidp_pool": "ffn",
        "sidp_mode": "auto",
        "sidp_batch_threshold": "auto",
        "sidp_placement": "interleaved",
        "sidp_cache_slots": None,
        "sidp_link_gbps": None,
        "sidp_colocate": False,
        "sidp_self_check": "full",
        "sidp_residency": "auto",
        "sidp_sampling": None,
        "engine": "",
        "own_dispatch": True,
        "is_server": False,
    }
    assert SidpConfig.from_values({"sidp": True}).sidp


def test_every_field_but_the_engine_s_own_is_a_flag_with_help() -> None:
    flags = SidpConfig.flags()
    assert set(flags) == {f.name for f in dataclasses.fields(SidpConfig)} - {
        "engine",
        "own_dispatch",
        "is_server",
    }
    assert all(options["help"] for options in flags.values())
    assert flag_name("sidp_link_gbps") == "--sidp-link-gbps"


CHOICES = [
    ("sidp_pool", POOLS),
    ("sidp_mode", MODES),
    ("sidp_placement", PLACEMENTS),
    ("sidp_self_check", SELF_CHECKS),
    ("sidp_residency", RESIDENCIES),
]


@pytest.mark.parametrize(("name", "choices"), CHOICES)
def test_known_values_pass_and_unknown_ones_are_named(name: str, choices: tuple[str, ...]) -> None:
    for choice in choices:
        assert getattr(SidpConfig.from_values({"sidp": True, name: choice}), name) == choice
    for unknown in ("everything", "", None, 3):
        message = refusal(sidp=True, **{name: unknown})
        assert flag_name(name) in message
        assert repr(unknown) in message
        assert all(choice in message for choice in choices), "says what to choose from"


@pytest.mark.parametrize("sidp", [False, True])
def test_sampling_is_a_flag_of_its_own(sidp: bool) -> None:
    def sampling(**values: Any) -> str | None:
        return SidpConfig.from_values({"sidp": sidp, **values}).sampling

    assert sampling() == ("auto" if sidp else None), "plain SGLang's stays as it is"
    assert sampling(sidp_sampling="auto") == "auto"
    assert sampling(sidp_sampling="sequence-parallel") == "sequence-parallel"
    assert sampling(sidp_sampling="replicated") is None
    for unknown in ("split", "", 3):
        message = refusal(sidp=sidp, sidp_sampling=unknown)
        assert f"--sidp-sampling {unknown!r} is unknown: choose one of auto, replicated" in message


@pytest.mark.parametrize("slots", [0, -1, "3", 2.0, True])
def test_slots_out_of_range(slots: Any) -> None:
    assert "--sidp-cache-slots" in refusal(sidp=True, sidp_cache_slots=slots)


@pytest.mark.parametrize("rate", [0, -1.5, float("inf"), float("nan"), "fast"])
def test_link_rate_out_of_range(rate: Any) -> None:
    assert "--sidp-link-gbps" in refusal(sidp=True, sidp_link_gbps=rate)


@pytest.mark.parametrize(
    ("given", "taken"), [("auto", "auto"), (1, 1), (64, 64), ("64", 64), ("007", 7)]
)
def test_a_threshold_is_auto_or_a_batch_size(given: Any, taken: int | str) -> None:
    config = SidpConfig.from_values({"sidp": True, "sidp_batch_threshold": given})
    assert config.sidp_batch_threshold == taken
    assert type(config.sidp_batch_threshold) is type(taken)


@pytest.mark.parametrize(
    "value", [0, -3, "0", "-3", "", "many", "8.0", 8.0, "1e2", " 8", "٨", "²", True, False, None]
)
def test_a_threshold_that_is_no_batch_size(value: Any) -> None:
    message = refusal(sidp=True, sidp_batch_threshold=value)
    assert "--sidp-batch-threshold" in message
    assert repr(value) in message


@pytest.mark.parametrize("mode", ["was", "cas"])
@pytest.mark.parametrize("threshold", [8, "8"])
def test_a_threshold_has_no_effect_where_the_mode_is_fixed(mode: str, threshold: Any) -> None:
    message = refusal(sidp=True, sidp_mode=mode, sidp_batch_threshold=threshold)
    assert "--sidp-batch-threshold 8 has no effect with --sidp-mode" in message
    assert mode in message
    SidpConfig.from_values({"sidp": True, "sidp_mode": mode, "sidp_batch_threshold": "auto"})


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_the_switch_is_a_switch(value: Any) -> None:
    assert "--sidp is a switch" in refusal(sidp=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sidp_pool", "linear"),
        ("sidp_mode", "was"),
        ("sidp_mode", "cas"),
        ("sidp_batch_threshold", 8),
        ("sidp_batch_threshold", "8"),
        ("sidp_placement", "contiguous"),
        ("sidp_cache_slots", 2),
        ("sidp_link_gbps", 1.0),
        ("sidp_self_check", "off"),
    ],
)
def test_a_flag_without_sidp_is_refused(name: str, value: Any) -> None:
    message = refusal(**{name: value})
    assert flag_name(name) in message
    assert "without --sidp" in message


@given(
    st.sampled_from(POOLS),
    st.sampled_from(PLACEMENTS),
    st.none() | st.integers(1, 1000),
    st.none() | st.floats(1e-6, 1e6),
    st.just("auto") | st.integers(1, 1000) | st.integers(1, 1000).map(str),
)
def test_valid_values_survive_the_way_into_other_processes(
    pool: str,
    placement: str,
    slots: int | None,
    rate: float | None,
    threshold: int | str,
) -> None:
    config = SidpConfig.from_values(
        {
            "sidp": True,
            "sidp_pool": pool,
            "sidp_placement": placement,
            "sidp_cache_slots": slots,
            "sidp_link_gbps": rate,
            "sidp_batch_threshold": threshold,
        }
    ).of_engine("engine", "auto", is_server=False)
    assert SidpConfig(**config.as_dict()) == config


def test_blocks_stay_in_mode_auto_only() -> None:
    assert SidpConfig(sidp=True).has_residency
    assert not SidpConfig(sidp=True, sidp_residency="off").has_residency
    for mode in ("was", "cas"):
        assert not SidpConfig(sidp=True, sidp_mode=mode).has_residency

"""Faults on purpose: read from the environment, and as often as they were asked for."""

import time

import pytest

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.scheduler.disturbances import (
    VARIABLE,
    Disturbances,
    DisturbedAnswers,
    ForcedSwitches,
    from_environment,
)
from sidp_sgl.scheduler.modes.policy import CAS, WAS


def read(monkeypatch: pytest.MonkeyPatch, text: str) -> Disturbances | None:
    monkeypatch.setenv(VARIABLE, text)
    return from_environment()


def test_nothing_is_disturbed_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert from_environment() is None
    assert read(monkeypatch, "") is None


def test_disturbances_are_read_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "switch_every=5,decline=0.2,delay=0.1,delay_ms=20,seed=1"
    assert read(monkeypatch, text) == Disturbances(5, 0.2, 0.1, 20.0, 1)
    assert read(monkeypatch, "decline=1") == Disturbances(decline=1.0)


@pytest.mark.parametrize(
    "text", ["decline", "decline=", "decline=often", "declines=0.1", "switch_every=2.5", "a=1=2"]
)
def test_what_can_not_be_read_is_refused_in_one_line(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SidpUsageError, match=VARIABLE) as caught:
        read(monkeypatch, text)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


def refusals(answers: DisturbedAnswers, count: int) -> list[str | None]:
    return [answers.refusal() for _ in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_as_many_requests_are_declined_as_was_asked_for(share: float) -> None:
    given = refusals(DisturbedAnswers(Disturbances(decline=share), rank=1), 2000)
    assert set(given) <= {None, "disturbed"}
    assert given.count("disturbed") == pytest.approx(2000 * share, abs=100 if 0 < share < 1 else 0)


def test_a_seed_gives_every_rank_declines_of_its_own_and_the_same_ones_again() -> None:
    def given(seed: int, rank: int) -> list[str | None]:
        return refusals(DisturbedAnswers(Disturbances(decline=0.5, seed=seed), rank), 64)

    assert given(1, 0) == given(1, 0)
    assert len({tuple(given(seed, rank)) for seed in range(3) for rank in range(4)}) == 12


def test_answers_are_delayed_as_long_as_was_asked_for() -> None:
    started = time.monotonic()
    refusals(DisturbedAnswers(Disturbances(delay=1.0, delay_ms=5.0), rank=0), 4)
    assert time.monotonic() - started >= 0.02
    started = time.monotonic()
    refusals(DisturbedAnswers(Disturbances(delay=0.0, delay_ms=1e4), rank=0), 4)
    assert time.monotonic() - started < 10  # one delay would be that long


@pytest.mark.parametrize("steps", [1, 4])
def test_modes_change_every_few_steps_whatever_the_batch(steps: int) -> None:
    policy = ForcedSwitches(steps)
    modes = [policy.decide(batch_size, threshold=8) for batch_size in range(1, 6 * steps + 1)]
    assert modes == ([CAS] * steps + [WAS] * steps) * 3
    assert policy.switches == policy.reasons["forced"] == 5
    assert policy.mode == WAS

"""The mode policy: follows the threshold, and never flaps."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.scheduler.modes.policy import CAS, DWELL_STEPS, WAS, ModePolicy

thresholds = st.integers(0, 300)
sizes = st.integers(1, 300)


def modes(steps: list[tuple[int, int | None]], policy: ModePolicy | None = None) -> list[str]:
    policy = policy or ModePolicy("auto")
    return [policy.decide(batch_size, threshold) for batch_size, threshold in steps]


@pytest.mark.parametrize("mode", [WAS, CAS])
def test_a_configured_mode_is_constant(mode: str) -> None:
    policy = ModePolicy(mode)
    assert modes([(1, 10), (1, None), (50, 10), (50, 10)] * 5, policy) == [mode] * 20
    assert (policy.mode, policy.switches, policy.reasons) == (mode, 0, {})


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="no such mode: fast"):
        ModePolicy("fast")


def test_the_first_decision_follows_the_threshold_at_once() -> None:
    assert modes([(9, 10)]) == [CAS]
    assert modes([(10, 10)]) == [WAS]
    assert modes([(1, None)]) == [WAS]
    assert modes([(95, 100)]) == [WAS], "in the band nothing speaks for a change"


def test_a_switch_needs_steps_in_a_row() -> None:
    policy = ModePolicy("auto")
    small, large = (1, 10), (10, 10)
    assert modes([small, large, large, large, small], policy) == [CAS] * 5
    assert modes([large] * 4, policy) == [CAS] * 3 + [WAS]
    assert modes([small] * 4, policy) == [WAS] * 3 + [CAS]
    assert policy.switches == 2
    assert policy.reasons == {"batch reached threshold": 1, "batch fell below threshold": 1}


def test_the_band_below_the_threshold_keeps_the_mode() -> None:
    policy = ModePolicy("auto")
    modes([(100, 100)], policy)
    assert modes([(90, 100)] * 10, policy) == [WAS] * 10
    assert modes([(89, 100)] * 4, policy)[-1] == CAS
    assert modes([(99, 100)] * 10, policy) == [CAS] * 10
    assert modes([(100, 100)] * 4, policy)[-1] == WAS


def test_the_band_interrupts_a_row() -> None:
    policy = ModePolicy("auto")
    assert modes([(100, 100), *[(1, 100), (95, 100)] * 20], policy) == [WAS] * 41


def test_a_threshold_that_is_lost_leads_to_was() -> None:
    policy = ModePolicy("auto")
    assert modes([(1, 10), *[(1, None)] * 4], policy) == [CAS] * 4 + [WAS]
    assert policy.reasons == {"no threshold": 1}


@given(st.integers(2, 10))
def test_a_small_threshold_has_no_band(threshold: int) -> None:
    assert modes([(threshold, threshold), *[(threshold - 1, threshold)] * 4])[-1] == CAS


@given(st.integers(2, 300), sizes)
def test_a_steady_batch_ends_in_the_mode_of_its_side(threshold: int, batch_size: int) -> None:
    for before in (1, 1000):
        final = modes([(before, threshold), *[(batch_size, threshold)] * 4])[-1]
        if batch_size >= threshold:
            assert final == WAS
        elif batch_size < math.ceil(threshold * 0.9) or threshold <= 10:
            assert final == CAS
        else:
            assert final == (CAS if before < threshold else WAS)


@given(sizes, st.none() | thresholds, st.integers(1, 50))
def test_a_constant_input_switches_never_after_the_first_decision(
    batch_size: int, threshold: int | None, steps: int
) -> None:
    assert len(set(modes([(batch_size, threshold)] * steps))) == 1


@given(st.lists(st.tuples(st.integers(1, 30), st.none() | st.integers(0, 30)), max_size=200))
def test_no_sequence_makes_it_flap(steps: list[tuple[int, int | None]]) -> None:
    policy = ModePolicy("auto")
    decided = modes(steps, policy)
    changes = [step for step, (one, other) in enumerate(pairwise(decided), 1) if one != other]
    assert policy.switches == len(changes) == sum(policy.reasons.values())
    assert len(changes) <= len(steps) / DWELL_STEPS
    assert all(later - earlier >= DWELL_STEPS for earlier, later in pairwise(changes))


@given(st.lists(sizes, min_size=1, max_size=200), thresholds, st.booleans())
def test_a_ramp_switches_once_at_most(
    batch_sizes: list[int], threshold: int, is_falling: bool
) -> None:
    policy = ModePolicy("auto")
    modes([(size, threshold) for size in sorted(batch_sizes, reverse=is_falling)], policy)
    assert policy.switches <= 1


@given(st.lists(st.integers(0, 2), max_size=50), st.integers(0, 1))
def test_cas_is_never_chosen_where_was_hides_every_fetch(
    batch_sizes: list[int], threshold: int
) -> None:
    assert CAS not in modes([(size, threshold) for size in batch_sizes])

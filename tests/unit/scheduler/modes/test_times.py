"""Step times: what was measured at start, what the steps teach, and the threshold from both."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.scheduler.modes.policy import CAS, WAS, ModePolicy
from sidp_sgl.scheduler.modes.times import StepTimes

TABLE = {1: 0.010, 4: 0.013, 16: 0.025}
times = st.floats(0, 10)
tables = st.dictionaries(st.integers(1, 64), st.floats(1e-4, 10), min_size=1, max_size=6)
observations = st.lists(
    st.tuples(st.sampled_from([WAS, CAS]), st.integers(1, 80), times, times), max_size=30
)


def new(fetch_seconds: float = 0.05) -> StepTimes:
    return StepTimes(fetch_seconds, TABLE)


def taught(fetch: float, table: dict[int, float], steps: list[tuple]) -> StepTimes:
    step_times = StepTimes(fetch, table)
    for mode, batch_size, local, stall in steps:
        step_times.observe(mode, batch_size, local + stall, stall)
    return step_times


@pytest.mark.parametrize("table", [{}, {1: 0.01, 2: 0.0}])
def test_a_table_that_is_empty_or_has_no_time_is_refused(table: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="one measured batch size at least, and times above 0"):
        StepTimes(1.0, table)


@pytest.mark.parametrize(
    "batch_size, seconds", [(1, 0.010), (2, 0.011), (4, 0.013), (10, 0.019), (32, 0.041)]
)
def test_times_lie_on_the_lines_between_the_measured_ones(batch_size: int, seconds: float) -> None:
    assert new().step_seconds(WAS, batch_size) == pytest.approx(seconds)


def test_smaller_batches_lie_on_the_first_line_but_not_below_their_part_of_the_rows() -> None:
    step_times = StepTimes(1.0, {8: 0.02, 16: 0.03})
    assert step_times.step_seconds(WAS, 4) == pytest.approx(0.015)
    step_times = StepTimes(1.0, {8: 0.02, 16: 0.06})
    assert step_times.step_seconds(WAS, 2) == pytest.approx(0.005)


def test_one_measured_size_stands_for_all() -> None:
    assert {StepTimes(1.0, {4: 0.02}).step_seconds(WAS, size) for size in (1, 4, 100)} == {0.02}


def test_a_larger_batch_is_never_taken_for_faster() -> None:
    step_times = StepTimes(1.0, {1: 0.02, 2: 0.01, 4: 0.03})
    assert step_times.step_seconds(WAS, 2) == 0.02
    assert step_times.step_seconds(WAS, 3) == pytest.approx(0.025)


def test_the_threshold_is_where_a_step_takes_as_long_as_the_fetches() -> None:
    assert new(0.05).threshold(64) == 41
    assert new(0.0195).threshold(64) == 11
    assert new(0.05).threshold(40) == 41, "never: one more than the largest batch"
    assert new(0.05).threshold(20) == 21
    assert new(0.010).threshold(64) == 1
    assert new(0.0).threshold(64) == 1


def test_the_way_to_the_owners_lowers_the_threshold() -> None:
    step_times = new(0.05)
    step_times.observe(CAS, 4, 0.033, 0.0)
    assert step_times.overhead_seconds(CAS, 4) == pytest.approx(0.020)
    assert step_times.threshold(64) < 21, "the way costs more where more is sent"
    step_times.observe(WAS, 4, 0.050, 0.037)
    assert step_times.overhead_seconds(WAS, 4) == pytest.approx(0.0)
    threshold = step_times.threshold(64)
    assert (
        step_times.step_seconds(CAS, threshold - 1)
        < 0.05
        <= step_times.step_seconds(CAS, threshold)
    )


def test_hidden_fetches_that_slow_the_compute_are_not_worth_it() -> None:
    step_times = new(0.05)
    step_times.observe(WAS, 48, 0.070, 0.0)
    step_times.observe(CAS, 48, 0.058, 0.0)
    assert step_times.threshold(64) == 65, "CaS is faster at every batch that may use it"


def test_a_was_step_may_take_a_little_longer() -> None:
    step_times = new(0.05)
    step_times.observe(WAS, 48, 0.059, 0.0)
    step_times.observe(CAS, 48, 0.057, 0.0)
    assert step_times.threshold(64) == 41, "3 % longer, but it asks nothing of the owners"


def test_overhead_is_what_a_step_takes_beyond_compute_and_stall() -> None:
    step_times = new()
    step_times.observe(WAS, 4, 0.050, 0.033)
    assert step_times.overhead_seconds(WAS, 4) == pytest.approx(0.004)
    step_times.observe(WAS, 4, 0.052, 0.033)
    step_times.observe(WAS, 4, 0.090, 0.033)
    assert step_times.overhead_seconds(WAS, 4) == pytest.approx(0.006), "the median"
    assert step_times.step_seconds(WAS, 4) == pytest.approx(0.019)


def test_single_disturbed_steps_do_not_count() -> None:
    step_times = new()
    for step in range(60):
        step_times.observe(CAS, 4, 0.120 if step % 3 == 2 else 0.017, 0.0)
        assert step < 2 or step_times.overhead_seconds(CAS, 4) == pytest.approx(0.004)


def test_a_lasting_change_counts_soon() -> None:
    step_times = new()
    for step in range(28):
        step_times.observe(CAS, 4, 0.017 if step < 20 else 0.033, 0.0)
    assert step_times.overhead_seconds(CAS, 4) == pytest.approx(0.020)


def test_a_mode_that_was_not_seen_is_taken_to_be_like_the_other() -> None:
    step_times = new()
    assert step_times.overhead_seconds(CAS, 4) == step_times.overhead_seconds(WAS, 4) == 0.0
    step_times.observe(WAS, 4, 0.050, 0.033)
    assert step_times.overhead_seconds(CAS, 4) == pytest.approx(0.004)
    step_times.observe(CAS, 4, 0.023, 0.0)
    assert step_times.overhead_seconds(CAS, 4) == pytest.approx(0.010)
    assert step_times.overhead_seconds(WAS, 4) == pytest.approx(0.004)


def test_a_step_that_takes_less_than_measured_lowers_the_estimate() -> None:
    step_times = new(0.01)
    step_times.observe(WAS, 16, 0.005, 0.0)
    assert step_times.step_seconds(WAS, 16) == pytest.approx(0.005)
    assert step_times.step_seconds(WAS, 1) == 0.0


def test_an_overhead_goes_with_the_square_root_of_the_compute() -> None:
    """Of 40 ms that are added at batch 64 less is expected at batch 1, but not as much less as the
    compute is; and the other way round."""
    step_times = StepTimes(0.065, {1: 0.010, 64: 0.040})
    step_times.observe(CAS, 64, 0.080, 0.0)
    assert step_times.overhead_seconds(CAS, 64) == pytest.approx(0.040)
    assert step_times.overhead_seconds(CAS, 1) == pytest.approx(0.020)
    step_times = StepTimes(0.065, {1: 0.010, 64: 0.040})
    step_times.observe(CAS, 1, 0.015, 0.0)
    assert step_times.step_seconds(CAS, 64) == pytest.approx(0.050)


def test_modes_are_compared_whatever_batches_they_were_seen_at() -> None:
    step_times = StepTimes(0.05, {1: 0.010, 64: 0.064})
    step_times.observe(CAS, 1, 0.014, 0.0)
    step_times.observe(WAS, 64, 0.074, 0.0)
    assert 33 < step_times.threshold(64) < 50, "4 ms at batch 1 are 10 ms at batch 64"


def test_a_step_bound_by_its_fetches_measures_them() -> None:
    step_times = new(0.05)
    step_times.observe(WAS, 4, 0.10, 0.08)
    assert step_times.fetch_seconds == pytest.approx(0.055)
    step_times.observe(WAS, 4, 0.10, 0.01)
    assert step_times.fetch_seconds == pytest.approx(0.055), "it hardly stalled"
    step_times.observe(CAS, 4, 0.10, 0.08)
    assert step_times.fetch_seconds == pytest.approx(0.055), "the stall of another mode"


def test_a_was_step_that_is_shorter_than_its_fetches_corrects_them() -> None:
    step_times = new(0.05)
    step_times.observe(WAS, 4, 0.04, 0.0)
    assert step_times.fetch_seconds == pytest.approx(0.049)


def test_dear_cas_steps_are_forgotten_in_time() -> None:
    """Otherwise one bad experience would rule CaS out for ever: WaS steps can't correct it."""
    step_times = new(0.05)
    step_times.observe(CAS, 4, 0.4, 0.0)
    assert step_times.threshold(64) == 1
    for _ in range(2000):
        step_times.observe(WAS, 4, 0.05, 0.037)
    assert step_times.threshold(64) > 10


def run_auto(step_times: StepTimes, steps: int, batch_size: int, seconds: dict) -> float:
    """Share of CaS in the steps of a rank whose fetches take 0.05 s; `seconds` of each mode."""
    policy = ModePolicy("auto")
    num_cas = 0
    stalls = {CAS: 0.0, WAS: max(0.0, 0.05 - StepTimes(0.05, TABLE).step_seconds(WAS, batch_size))}
    for step in range(steps):
        if step % 16 == 0:
            threshold = step_times.threshold(64)
            threshold = threshold if threshold <= 64 else 128  # as StepModes: out of reach
        mode = policy.decide(batch_size, threshold)
        num_cas += mode == CAS
        step_times.observe(mode, batch_size, seconds[mode], stalls[mode])
    return num_cas / steps


def test_cas_that_stays_dear_is_tried_ever_more_rarely() -> None:
    assert run_auto(new(0.05), 4000, 4, {WAS: 0.05, CAS: 0.064}) < 0.1


def test_was_that_stays_dear_is_tried_ever_more_rarely() -> None:
    step_times = new(0.05)
    step_times.observe(CAS, 4, 0.013, 0.0)
    assert run_auto(step_times, 4000, 48, {WAS: 0.068, CAS: 0.057}) > 0.9


def test_cas_comes_back_when_a_disturbance_is_over() -> None:
    step_times = new(0.05)
    run_auto(step_times, 20, 4, {WAS: 0.05, CAS: 0.2})
    assert run_auto(step_times, 800, 4, {WAS: 0.05, CAS: 0.016}) > 0.4


def test_was_comes_back_when_a_disturbance_is_over() -> None:
    step_times = new(0.05)
    run_auto(step_times, 100, 48, {WAS: 0.2, CAS: 0.06})
    assert run_auto(step_times, 800, 48, {WAS: 0.057, CAS: 0.06}) < 0.6


def test_a_disturbance_counts_ten_times_the_estimate_at_most() -> None:
    step_times = new(0.05)
    step_times.observe(WAS, 4, 100.0, 99.987)
    assert step_times.fetch_seconds == pytest.approx(0.05 + 0.1 * 0.45)
    assert step_times.overhead_seconds(WAS, 4) == pytest.approx(0.0), "the fetches were disturbed"
    step_times = new(0.05)
    step_times.observe(WAS, 4, 100.0, 0.0)
    assert step_times.overhead_seconds(WAS, 4) == pytest.approx(0.5 - 0.013)
    step_times = new(0.05)
    step_times.observe(CAS, 4, 0.033, 0.0)
    step_times.observe(CAS, 4, 100.0, 0.0)
    assert step_times.overhead_seconds(CAS, 4) == pytest.approx((0.020 + 0.33 - 0.013) / 2)


def test_a_first_cas_step_is_believed_up_to_ten_times_a_was_step() -> None:
    step_times = new(0.05)
    step_times.observe(CAS, 4, 100.0, 0.0)
    assert step_times.step_seconds(CAS, 4) == pytest.approx(0.5)


def test_estimates_recover_from_times_of_zero() -> None:
    step_times = StepTimes(0.0, {1: 0.01})
    step_times.observe(WAS, 1, 0.0, 0.0)
    assert step_times.step_seconds(WAS, 1) == 0.0
    for _ in range(3):
        step_times.observe(WAS, 1, 0.02, 0.0)
    assert step_times.step_seconds(WAS, 1) == pytest.approx(0.02)


@given(times, tables, observations, st.integers(0, 100))
def test_from_the_threshold_on_was_is_as_fast_as_cas(
    fetch: float, table: dict[int, float], steps: list[tuple], max_batch: int
) -> None:
    step_times = taught(fetch, table, steps)

    def streams(size: int) -> bool:
        compute = StepTimes(fetch, table).step_seconds(WAS, size)
        was, cas = (compute + step_times.overhead_seconds(mode, size) for mode in (WAS, CAS))
        return step_times.fetch_seconds <= cas and was <= 1.05 * cas

    threshold = step_times.threshold(max_batch)
    assert not any(streams(size) for size in range(1, threshold))
    assert all(streams(size) for size in range(threshold, max_batch + 1))


@given(times, tables, observations, st.sampled_from([WAS, CAS]))
def test_estimates_never_fall_with_the_batch_nor_below_zero(
    fetch: float, table: dict[int, float], steps: list[tuple], mode: str
) -> None:
    step_times = taught(fetch, table, steps)
    estimates = [step_times.step_seconds(mode, size) for size in range(1, 100)]
    assert min(estimates) >= 0.0
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(estimates))
    assert step_times.fetch_seconds >= 0.0


@given(st.floats(0.01, 0.1), st.floats(0.0, 0.02), st.floats(0.0, 0.02))
def test_steady_steps_are_learnt(fetch: float, overhead: float, way: float) -> None:
    step_times = new(fetch_seconds=0.04)
    local = TABLE[4] + overhead
    for _ in range(150):
        step_times.observe(CAS, 4, local + way, 0.0)
        step_times.observe(WAS, 4, max(local, fetch), max(0.0, fetch - local))
    assert step_times.step_seconds(WAS, 4) == pytest.approx(local)
    assert step_times.step_seconds(CAS, 4) == pytest.approx(local + way, rel=0.02)
    if fetch > local / 0.9:
        assert step_times.fetch_seconds == pytest.approx(fetch, rel=1e-3)

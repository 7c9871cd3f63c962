"""The share of an owner's time that goes to others, and the bound on it."""

import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.scheduler.modes.service_share import ServiceShare, decline_reason

gaps = st.floats(0, 2, allow_subnormal=False)


def test_an_owner_that_served_nobody_has_no_share() -> None:
    assert ServiceShare().share(5.0) == 0.0


def test_intervals_count_by_their_part_in_the_window() -> None:
    share = ServiceShare(window_seconds=2.0)
    share.add(10.0, 10.5)
    share.add(11.0, 11.5)
    assert share.share(11.5) == pytest.approx(0.5)
    assert share.share(12.0) == pytest.approx(0.5)
    assert share.share(12.25) == pytest.approx(0.375), "half of the first has left the window"
    assert share.share(12.5) == pytest.approx(0.25)
    assert share.share(13.25) == pytest.approx(0.125)
    assert share.share(13.5) == 0.0


def test_an_interval_longer_than_the_window_fills_it() -> None:
    share = ServiceShare()
    share.add(0.0, 5.0)
    assert share.share(5.0) == 1.0
    assert share.share(5.25) == pytest.approx(0.75)


def test_an_interval_that_ends_after_the_question_moves_the_window() -> None:
    share = ServiceShare()
    share.add(9.25, 9.75)
    share.add(10.0, 10.5)
    assert share.share(9.9) == pytest.approx(0.75)


@given(st.lists(st.tuples(gaps, gaps), max_size=40), gaps, st.floats(0.1, 3), st.data())
def test_the_share_is_the_busy_part_of_the_window(
    steps: list[tuple[float, float]], later: float, window: float, data: st.DataObject
) -> None:
    share = ServiceShare(window)
    intervals: list[tuple[float, float]] = []
    now = 100.0
    for idle, busy in steps:
        intervals.append((now + idle, now + idle + busy))
        now += idle + busy
        share.add(*intervals[-1])
        if data.draw(st.booleans()):
            assert share.share(now) == pytest.approx(busy_part(intervals, now, window), abs=1e-6)
    now += later
    assert share.share(now) == pytest.approx(busy_part(intervals, now, window), abs=1e-6)


def busy_part(intervals: list[tuple[float, float]], now: float, window: float) -> float:
    inside = (min(end, now) - max(start, now - window) for start, end in intervals)
    return sum(seconds for seconds in inside if seconds > 0) / window


def test_many_short_intervals_leave_only_the_window_in_memory() -> None:
    share = ServiceShare()
    for index in range(20_000):
        share.add(index / 1000, index / 1000 + 0.0005)
    assert len(share._intervals) <= 1001
    assert share.share(20.0) == pytest.approx(0.5, abs=1e-3)


def test_one_thread_may_ask_while_another_adds() -> None:
    share = ServiceShare(window_seconds=0.01)
    ends = [index / 1000 for index in range(20_001)]

    def serve() -> None:
        for start, end in pairwise(ends):
            share.add(start, (start + end) / 2)

    server = threading.Thread(target=serve)
    server.start()
    while server.is_alive():
        assert 0.0 <= share.share(0.0) <= 0.56
    assert share.share(0.0) == pytest.approx(0.5, abs=0.06)


def test_an_idle_owner_always_serves() -> None:
    assert decline_reason(1.0, own_batch_size=0) is None


def test_a_working_owner_serves_up_to_its_limit() -> None:
    assert decline_reason(0.49, own_batch_size=1) is None
    assert decline_reason(0.5, own_batch_size=1) == "busy"

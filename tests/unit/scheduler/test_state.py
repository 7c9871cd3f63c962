"""Rank states: the latest of every rank is kept, and only news is published."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.scheduler.state import GroupState, RankState, is_worth_publishing

STATE = RankState(
    rank=1,
    number=5,
    running_batch_size=3,
    waiting_requests=2,
    received=5,
    max_running_requests=64,
    kv_capacity_tokens=1600,
    kv_headroom_tokens=800,
    step_seconds=0.01,
    mode="was",
)


def published_after(seconds: float, state: RankState) -> bool:
    return is_worth_publishing(STATE, 100.0, state, 100.0 + seconds)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9))))
def test_the_newest_state_of_every_rank_is_kept(updates: list[tuple[int, int]]) -> None:
    group = GroupState()
    newest: dict[int, int] = {}
    for rank, number in updates:
        is_new = number > newest.get(rank, -1)
        assert group.update(replace(STATE, rank=rank, number=number)) == is_new
        newest[rank] = max(number, newest.get(rank, -1))
    assert [(state.rank, state.number) for state in group.all()] == sorted(newest.items())


def test_an_equal_number_does_not_replace_what_is_known() -> None:
    group = GroupState()
    assert group.of(1) is None
    assert group.update(STATE)
    assert not group.update(replace(STATE, waiting_requests=9))
    assert group.of(1) == STATE


def test_the_first_state_is_news() -> None:
    assert is_worth_publishing(None, 0.0, STATE, 0.0)


@pytest.mark.parametrize(
    "change",
    [
        {"running_batch_size": 4},
        {"waiting_requests": 0},
        {"kv_capacity_tokens": 1700},
        {"mode": "cas"},
        {"kv_headroom_tokens": 700},
        {"kv_headroom_tokens": 900},
    ],
)
def test_what_decides_is_news_at_once(change: dict) -> None:
    assert published_after(0.0, replace(STATE, **change))


@pytest.mark.parametrize(
    "change", [{"kv_headroom_tokens": 701}, {"kv_headroom_tokens": 899}, {"step_seconds": 5.0}]
)
def test_small_changes_wait_for_a_tenth_of_a_second(change: dict) -> None:
    assert not published_after(0.09, replace(STATE, **change))
    assert published_after(0.11, replace(STATE, **change))


@given(st.integers(0, 10**6), st.floats(0, 1e6))
def test_a_new_number_alone_is_never_news(number: int, seconds: float) -> None:
    assert not published_after(seconds, replace(STATE, number=number))


def test_a_rank_without_capacity_has_news_too() -> None:
    empty = replace(STATE, kv_capacity_tokens=0, kv_headroom_tokens=0)
    assert not is_worth_publishing(empty, 0.0, replace(empty, number=6), 1.0)
    assert is_worth_publishing(empty, 0.0, replace(empty, kv_headroom_tokens=1), 0.0)

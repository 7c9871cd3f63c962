"""A rank's end of the dispatch: only news is published, recalls are heard once, nothing blocks."""

import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sidp_sgl.scheduler import bus
from sidp_sgl.scheduler.dispatch.link import ControllerLink, is_worth_publishing
from sidp_sgl.scheduler.messages import DispatchUpdate, LeaseRequest, RankState, Recall
from tests.support.control import wait_until

STATE = RankState(
    rank=1,
    running_batch_size=3,
    waiting_requests=2,
    received=5,
    max_running_requests=64,
    kv_capacity_tokens=1600,
    kv_headroom_tokens=800,
)


@pytest.fixture
def link(engine_name: str) -> Iterator[ControllerLink]:
    made = ControllerLink(1, engine_name)
    yield made
    made.close()


def published_after(seconds: float, state: RankState) -> bool:
    return is_worth_publishing(STATE, 100.0, state, 100.0 + seconds)


def test_the_first_state_is_news() -> None:
    assert is_worth_publishing(None, 0.0, STATE, 0.0)


@pytest.mark.parametrize(
    "change",
    [
        {"running_batch_size": 4},
        {"waiting_requests": 0},
        {"received": 6},
        {"kv_capacity_tokens": 1700},
        {"kv_headroom_tokens": 700},
        {"kv_headroom_tokens": 900},
    ],
)
def test_what_decides_is_news_at_once(change: dict) -> None:
    assert published_after(0.0, replace(STATE, **change))


@pytest.mark.parametrize("headroom", [701, 899])
def test_small_changes_wait_for_a_tenth_of_a_second(headroom: int) -> None:
    state = replace(STATE, kv_headroom_tokens=headroom)
    assert not published_after(0.09, state)
    assert published_after(0.11, state)


@given(st.floats(0, 1e6))
def test_the_same_again_is_never_news(seconds: float) -> None:
    assert not published_after(seconds, replace(STATE))


def test_a_rank_without_capacity_has_news_too() -> None:
    empty = replace(STATE, kv_capacity_tokens=0, kv_headroom_tokens=0)
    assert not is_worth_publishing(empty, 0.0, replace(empty), 1.0)
    assert is_worth_publishing(empty, 0.0, replace(empty, kv_headroom_tokens=1), 0.0)


def test_the_controller_hears_what_is_news(link: ControllerLink, engine_name: str) -> None:
    controller = bus.Inbox(bus.states_address(engine_name))
    news = [STATE, replace(STATE, waiting_requests=1), replace(STATE, waiting_requests=0)]
    for number, state in enumerate(news):
        for _ in range(100):
            link.publish(state, now=float(number))
    heard: list[object] = []
    wait_until(lambda: bool(heard.extend(controller.drain())) or len(heard) >= len(news))
    assert heard == news
    assert link.outbox.sent == len(news)
    controller.close()


def test_recalls_are_heard_once(link: ControllerLink, engine_name: str) -> None:
    controller = bus.Outbox({1: bus.dispatch_address(engine_name, 1)})
    assert link.recalled() == 0
    for message in (Recall(4), LeaseRequest(2, 1, 4), Recall(3), DispatchUpdate(5, 6, 7)):
        controller.send(1, message)
    controller.send_bytes(1, b"?")
    recalled: list[int] = []

    def is_heard() -> bool:
        recalled.append(link.recalled())
        return link.inbox.malformed == 1

    wait_until(is_heard)
    assert max(recalled) >= 3 and link.recalled() == 0
    assert link.update == DispatchUpdate(5, 6, 7)
    controller.close()


def test_a_controller_that_is_stopped_holds_up_nobody(link: ControllerLink) -> None:
    started = time.monotonic()
    for number in range(5000):
        link.publish(replace(STATE, received=number), 0.0)
    assert time.monotonic() - started < 5.0
    assert link.outbox.dropped > 0

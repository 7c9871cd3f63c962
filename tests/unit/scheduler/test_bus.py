"""Control messages over real sockets: in order, or dropped and counted, but never waited for."""

import os
import time
from collections.abc import Callable, Iterator

import pytest

from sidp_sgl.scheduler import bus
from sidp_sgl.scheduler.bus import Inbox, Outbox
from sidp_sgl.scheduler.messages import LeaseDecline, LeaseRequest, Message, encode

AMPLE_SECONDS = 10.0
MANY = 20_000  # more than all queues and buffers on the way take


@pytest.fixture
def open_inbox(engine_name: str) -> Iterator[Callable[[int], Inbox]]:
    opened: list[Inbox] = []

    def open_one(rank: int) -> Inbox:
        opened.append(Inbox(bus.requests_address(engine_name, rank)))
        return opened[-1]

    yield open_one
    for inbox in opened:
        inbox.close()


@pytest.fixture
def outbox(engine_name: str) -> Iterator[Outbox]:
    """Connected with ranks 0 and 1, whether they are there or not."""
    result = Outbox({rank: bus.requests_address(engine_name, rank) for rank in range(2)})
    yield result
    result.close()


def decline(step: int) -> LeaseDecline:
    return LeaseDecline(3, 0, step, "busy")


def receive_all(inbox: Inbox, count: int) -> list[Message]:
    received: list[Message] = []
    deadline = time.monotonic() + AMPLE_SECONDS
    while len(received) < count and time.monotonic() < deadline:
        if (message := inbox.receive(1.0)) is not None:
            received.append(message)
    return received


def send_many(outbox: Outbox, rank: int) -> float:
    """The longest time that one of MANY messages took to be sent, in seconds."""
    longest, data = 0.0, encode(decline(0))
    for _ in range(MANY):
        started = time.monotonic()
        outbox.send_bytes(rank, data)
        longest = max(longest, time.monotonic() - started)
    return longest


def test_messages_come_in_the_order_in_which_they_were_sent(
    open_inbox: Callable[[int], Inbox], outbox: Outbox
) -> None:
    inbox = open_inbox(0)
    sent: list[Message] = [decline(step) for step in range(300)]
    sent[100] = LeaseRequest(3, 100, 8)
    for message in sent:
        outbox.send(0, message)
    assert receive_all(inbox, len(sent)) == sent
    assert outbox.dropped == inbox.malformed == 0


def test_all_receivers_get_what_is_sent_to_all(
    open_inbox: Callable[[int], Inbox], outbox: Outbox
) -> None:
    inboxes = [open_inbox(0), open_inbox(1)]
    outbox.send_to_all(decline(1))
    outbox.send(1, decline(2))
    assert receive_all(inboxes[0], 1) == [decline(1)]
    assert receive_all(inboxes[1], 2) == [decline(1), decline(2)]
    assert inboxes[0].receive(0.0) is None


def test_nothing_comes_within_the_time_given(open_inbox: Callable[[int], Inbox]) -> None:
    inbox = open_inbox(0)
    started = time.monotonic()
    assert inbox.receive(0.02) is None
    assert 0.015 < time.monotonic() - started < AMPLE_SECONDS
    assert list(inbox.drain()) == []
    assert inbox.malformed == 0


def test_a_receiver_that_comes_later_gets_what_waits_for_it(
    open_inbox: Callable[[int], Inbox], outbox: Outbox
) -> None:
    outbox.send(0, decline(1))
    assert receive_all(open_inbox(0), 1) == [decline(1)]


def test_a_receiver_that_does_not_exist_blocks_nobody(outbox: Outbox) -> None:
    assert send_many(outbox, 0) < AMPLE_SECONDS
    assert 0 < outbox.dropped < MANY


def test_a_receiver_that_is_stopped_blocks_nobody_and_finds_the_oldest_messages(
    open_inbox: Callable[[int], Inbox], outbox: Outbox
) -> None:
    stopped, other = open_inbox(0), open_inbox(1)
    for step in range(5):
        outbox.send(0, decline(step))
    assert send_many(outbox, 0) < AMPLE_SECONDS
    assert (dropped := outbox.dropped) > 0
    outbox.send(1, decline(7))
    assert receive_all(other, 1) == [decline(7)], "it holds up its own messages only"
    assert receive_all(stopped, 5) == [decline(step) for step in range(5)]
    assert len(receive_all(stopped, MANY - dropped)) == MANY - dropped
    outbox.send(0, decline(8))
    assert receive_all(stopped, 1) == [decline(8)], "it goes on where there is room again"
    assert outbox.dropped == dropped


def test_malformed_bytes_are_counted_and_passed_over(
    open_inbox: Callable[[int], Inbox], outbox: Outbox
) -> None:
    inbox = open_inbox(0)
    good = encode(decline(1))
    bad = [b"", b"\x00\xff", b"{}", good[:-1], good.replace(b"step", b"stop"), b"\x91" * 10_000]
    for data in [*bad, good, bad[0], good]:
        outbox.send_bytes(0, data)
    received: list[Message] = []
    deadline = time.monotonic() + AMPLE_SECONDS
    while len(received) < 2 and time.monotonic() < deadline:
        received += inbox.drain()
    assert received == [decline(1), decline(1)]
    assert inbox.malformed == len(bad) + 1


def test_a_malformed_message_is_none_to_who_waits(
    open_inbox: Callable[[int], Inbox], outbox: Outbox
) -> None:
    inbox = open_inbox(0)
    outbox.send_bytes(0, b"?")
    started = time.monotonic()
    assert inbox.receive(AMPLE_SECONDS) is None
    assert time.monotonic() - started < AMPLE_SECONDS / 2
    assert inbox.malformed == 1


def test_every_address_is_another_one(engine_name: str) -> None:
    addresses = {bus.states_address(engine_name), bus.returns_address(engine_name)}
    for make in (bus.requests_address, bus.answers_address, bus.dispatch_address):
        addresses |= {make(engine_name, rank) for rank in range(2)}
    assert len(addresses) == 8
    assert {address[:7] for address in addresses} == {"ipc://@"}, "no file, whoever is killed"


def test_messages_of_other_users_do_not_arrive(
    outbox: Outbox, open_inbox: Callable[[int], Inbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = open_inbox(0)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    theirs = open_inbox(1)
    outbox.send_to_all(decline(7))
    assert ours.receive(AMPLE_SECONDS) == decline(7)
    assert theirs.receive(0.5) is None

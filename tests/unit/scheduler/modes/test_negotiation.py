"""Negotiations over a network that loses, delays, reorders, duplicates and garbles messages."""

from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import msgpack

from sidp_sgl.scheduler.messages import (
    LeaseDecline,
    LeaseGrant,
    LeaseRequest,
    Message,
    decode,
    encode,
)
from sidp_sgl.scheduler.modes.leases import answer
from sidp_sgl.scheduler.modes.negotiation import Negotiation


@pytest.fixture
def negotiation() -> Negotiation:
    return Negotiation(0, [1, 2])


def grant(owner: int, step: int, rows: int = 4, rank: int = 0) -> LeaseGrant:
    return LeaseGrant(owner, rank, step, rows)


def test_rows_are_granted_when_all_owners_have_granted(negotiation: Negotiation) -> None:
    assert negotiation.begin(4) == [(1, LeaseRequest(0, 1, 4)), (2, LeaseRequest(0, 1, 4))]
    negotiation.on_message(grant(1, 1))
    assert not negotiation.is_decided and not negotiation.is_granted
    negotiation.on_message(grant(2, 1))
    assert negotiation.is_decided and negotiation.is_granted
    assert negotiation.rows == 4
    assert (negotiation.requests, negotiation.granted, negotiation.declined) == (1, 1, 0)


def test_one_decline_decides(negotiation: Negotiation) -> None:
    negotiation.begin(4)
    negotiation.on_message(LeaseDecline(2, 0, 1, "busy"))
    assert negotiation.is_decided and not negotiation.is_granted
    negotiation.on_message(LeaseDecline(1, 0, 1, "busy"))
    assert (negotiation.granted, negotiation.declined) == (0, 1)


def test_a_grant_of_fewer_rows_is_a_decline(negotiation: Negotiation) -> None:
    negotiation.begin(4)
    negotiation.on_message(grant(1, 1))
    negotiation.on_message(grant(2, 1, rows=3))
    assert negotiation.is_decided and not negotiation.is_granted


def test_what_was_abandoned_is_over_and_late_answers_are_stale(negotiation: Negotiation) -> None:
    negotiation.begin(4)
    negotiation.on_message(grant(1, 1))
    negotiation.abandon()
    assert not negotiation.is_decided and negotiation.rows == 0
    negotiation.on_message(grant(2, 1))
    negotiation.on_message(LeaseDecline(2, 0, 1, "busy"))
    assert not negotiation.is_decided and negotiation.stale == 2


def test_an_old_grant_is_not_taken_for_the_new_one(negotiation: Negotiation) -> None:
    negotiation.begin(4)
    negotiation.on_message(grant(1, 1))
    negotiation.begin(2)
    negotiation.on_message(grant(2, 1))
    negotiation.on_message(grant(2, 2))
    assert not negotiation.is_decided
    negotiation.on_message(grant(1, 2))
    assert negotiation.is_granted
    assert negotiation.stale == 1


def test_what_is_not_ours_changes_nothing(negotiation: Negotiation) -> None:
    negotiation.begin(4)
    for message in (grant(3, 1), grant(0, 1), grant(1, 1, rank=2), LeaseDecline(3, 0, 1, "busy")):
        negotiation.on_message(message)
    assert not negotiation.is_decided
    negotiation.abandon()
    negotiation.on_message(grant(3, 1))
    assert negotiation.stale == 5


def test_a_second_answer_of_an_owner_is_stale(negotiation: Negotiation) -> None:
    negotiation.begin(4)
    negotiation.on_message(grant(1, 1))
    negotiation.on_message(grant(1, 1))
    negotiation.on_message(LeaseDecline(1, 0, 1, "busy"))
    assert not negotiation.is_decided
    assert negotiation.stale == 2


def test_a_rank_that_asks_nobody_has_all_it_needs() -> None:
    negotiation = Negotiation(0, [])
    assert negotiation.begin(4) == []
    assert negotiation.is_granted


class Network:
    """Every rank asks all others; any message may be lost, overtaken, doubled or garbled."""

    def __init__(self, random: Random) -> None:
        num_ranks = random.randint(2, 4)
        self.random = random
        self.rows_per_rank = random.randint(4, 12)
        self.negotiations = [
            Negotiation(rank, [owner for owner in range(num_ranks) if owner != rank])
            for rank in range(num_ranks)
        ]
        self.flying: list[tuple[int, bytes]] = []  # (to, data)
        self.dropped = 0

    def begin(self, rank: int, rows: int) -> None:
        self.send(self.negotiations[rank].begin(rows))

    def send(self, pairs: Iterable[tuple[int, Message]]) -> None:
        self.flying += [(to, encode(message)) for to, message in pairs]

    def deliver(self, to: int, data: bytes, refusal: str | None = None) -> None:
        message = decode(data)
        if isinstance(message, LeaseRequest):
            self.send([(message.rank, answer(to, message, self.rows_per_rank, refusal))])
        elif isinstance(message, LeaseGrant | LeaseDecline):
            self.negotiations[to].on_message(message)
        else:
            self.dropped += 1

    def step(self) -> None:
        """One thing happens."""
        rank = self.random.randrange(len(self.negotiations))
        chance = self.random.random()
        if chance < 0.12:
            self.begin(rank, self.random.randint(1, 6))
        elif chance < 0.2:
            self.negotiations[rank].abandon()
        elif self.flying:
            self.disturb(*self.flying.pop(self.next_index()))

    def next_index(self) -> int:
        # Often the oldest: else little gets through, and little goes wrong.
        return 0 if self.random.random() < 0.6 else self.random.randrange(len(self.flying))

    def disturb(self, to: int, data: bytes) -> None:
        """Deliver a message, or let something else become of it."""
        chance = self.random.random()
        if chance < 0.15:
            return
        if chance < 0.3:
            self.flying.append((to, data))  # again, later
        if chance > 0.95 and decode(data) is not None:
            self.flying += [(to, garbled(data, self.random)), (to, data)]
        else:
            self.deliver(to, data, self.random.choice([None, None, None, "busy"]))

    def flow(self) -> None:
        """All that is under way arrives; it causes answers, but no endless talk."""
        budget = 2 * len(self.flying)
        while self.flying:
            assert budget > 0
            budget -= 1
            self.deliver(*self.flying.pop(0))

    def assert_safe(self) -> None:
        """Who believes in rows has them."""
        for negotiation in self.negotiations:
            if negotiation.is_granted:
                assert 1 <= negotiation.rows <= self.rows_per_rank

    def assert_heals(self) -> None:
        """When messages flow again, a rank that begins anew gets its rows if they are there."""
        self.flow()
        for rank, negotiation in enumerate(self.negotiations):
            rows = self.random.randint(1, 6)
            self.begin(rank, rows)
            self.flow()
            assert negotiation.is_decided
            assert negotiation.is_granted == (rows <= self.rows_per_rank)
            self.assert_safe()


def garbled(data: bytes, random: Random) -> bytes:
    values = msgpack.decode(data)
    values[random.choice(list(values))] = random.choice([None, True, -1, 0.5, []])
    cut = data[: random.randrange(len(data))]
    return random.choice([cut, msgpack.encode(values), random.randbytes(5)])


@settings(max_examples=300)
@given(st.integers(0, 2**32))
def test_nobody_ever_believes_in_rows_that_it_has_not(seed: int) -> None:
    network = Network(Random(seed))
    for _ in range(4):
        for _ in range(60):
            network.step()
            network.assert_safe()
        network.assert_heals()


def test_the_network_lets_enough_through_to_show_something() -> None:
    """Over a few seeds: grants are used, declined, late; garbled messages arrive."""
    networks = [Network(Random(seed)) for seed in range(10)]
    for network in networks:
        for _ in range(300):
            network.step()
    negotiations = [negotiation for network in networks for negotiation in network.negotiations]
    for counter in ("granted", "declined", "stale"):
        assert sum(getattr(negotiation, counter) for negotiation in negotiations) > 30, counter
    assert sum(network.dropped for network in networks) > 30

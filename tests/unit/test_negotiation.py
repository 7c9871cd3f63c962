"""Negotiations over a network that loses, delays, reorders, duplicates and garbles messages."""

from collections.abc import Iterable
from itertools import combinations

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sidp_sgl.scheduler.leases import LeaseLedger
from sidp_sgl.scheduler.messages import (
    CasDecline,
    CasGrant,
    CasRelease,
    CasRequest,
    Message,
    decode,
    encode,
)
from sidp_sgl.scheduler.negotiation import Negotiation
from tests.unit.test_leases import assert_sound


@pytest.fixture
def negotiation() -> Negotiation:
    return Negotiation(0, [1, 2])


def grant(owner: int, step: int, offset: int = 0, rows: int = 4, rank: int = 0) -> CasGrant:
    return CasGrant(owner, rank, step, offset, rows)


def releases(step: int, *owners: int) -> list[tuple[int, CasRelease]]:
    return [(owner, CasRelease(0, step)) for owner in owners]


def test_rows_are_granted_when_all_owners_have_granted(negotiation: Negotiation) -> None:
    assert negotiation.begin(4) == [(1, CasRequest(0, 1, 4)), (2, CasRequest(0, 1, 4))]
    assert negotiation.on_message(grant(1, 1, offset=8)) == []
    assert not negotiation.is_decided
    assert negotiation.offsets == {}
    assert negotiation.on_message(grant(2, 1, offset=3)) == []
    assert negotiation.is_decided and negotiation.is_granted
    assert negotiation.offsets == {1: 8, 2: 3}
    assert (negotiation.rows, negotiation.step) == (4, 1)
    assert (negotiation.requests, negotiation.granted, negotiation.declined) == (1, 1, 0)


def test_one_decline_decides(negotiation: Negotiation) -> None:
    negotiation.begin(4)
    negotiation.on_message(CasDecline(2, 0, 1, "busy"))
    assert negotiation.is_decided and not negotiation.is_granted
    negotiation.on_message(CasDecline(1, 0, 1, "staging full"))
    assert negotiation.decline_reason == "busy", "the first one's"
    assert (negotiation.granted, negotiation.declined) == (0, 1)


def test_a_grant_of_fewer_rows_is_a_decline(negotiation: Negotiation) -> None:
    negotiation.begin(4)
    negotiation.on_message(grant(1, 1))
    negotiation.on_message(grant(2, 1, rows=3))
    assert negotiation.is_decided and not negotiation.is_granted
    assert negotiation.abandon() == releases(1, 1, 2)


def test_all_owners_are_released_also_the_silent_ones(negotiation: Negotiation) -> None:
    negotiation.begin(4)
    negotiation.on_message(grant(1, 1))
    assert negotiation.abandon() == releases(1, 1, 2)
    assert negotiation.abandon() == []
    assert not negotiation.is_decided and negotiation.rows == 0
    assert negotiation.decline_reason is None


def test_a_late_grant_is_given_back(negotiation: Negotiation) -> None:
    negotiation.begin(4)
    negotiation.abandon()
    assert negotiation.on_message(grant(1, 1)) == releases(1, 1)
    assert negotiation.on_message(CasDecline(2, 0, 1, "busy")) == []
    assert negotiation.stale == 2


def test_an_old_grant_is_not_taken_for_the_new_one(negotiation: Negotiation) -> None:
    negotiation.begin(4)
    negotiation.on_message(grant(1, 1))
    negotiation.begin(2)
    assert negotiation.on_message(grant(2, 1)) == [], "the new request supersedes it"
    negotiation.on_message(grant(2, 2))
    assert not negotiation.is_decided
    negotiation.on_message(grant(1, 2))
    assert negotiation.is_granted
    assert negotiation.stale == 1


def test_what_is_not_ours_changes_nothing(negotiation: Negotiation) -> None:
    negotiation.begin(4)
    for message in (grant(3, 1), grant(0, 1), grant(1, 1, rank=2), CasDecline(3, 0, 1, "busy")):
        assert negotiation.on_message(message) == []
    assert not negotiation.is_decided
    negotiation.abandon()
    assert negotiation.on_message(grant(3, 1)) == []
    assert negotiation.stale == 5


def test_a_step_that_was_not_begun_is_never_released(negotiation: Negotiation) -> None:
    assert negotiation.on_message(grant(1, 1)) == [], "a release would close the next step"


def test_a_second_answer_of_an_owner_is_stale(negotiation: Negotiation) -> None:
    negotiation.begin(4)
    negotiation.on_message(grant(1, 1, offset=8))
    negotiation.on_message(grant(1, 1, offset=8))
    negotiation.on_message(CasDecline(1, 0, 1, "busy"))
    assert not negotiation.is_decided
    assert negotiation.stale == 2


def test_a_rank_that_asks_nobody_has_all_it_needs() -> None:
    negotiation = Negotiation(0, [])
    assert negotiation.begin(4) == []
    assert negotiation.is_granted and negotiation.offsets == {}


class Network(RuleBasedStateMachine):
    """Every rank asks all others; any message may be lost, held back, doubled or garbled."""

    @initialize(num_ranks=st.integers(2, 4), capacity=st.integers(4, 12))
    def start(self, num_ranks: int, capacity: int) -> None:
        self.ledgers = [LeaseLedger(capacity) for _ in range(num_ranks)]
        self.negotiations = [
            Negotiation(rank, [owner for owner in range(num_ranks) if owner != rank])
            for rank in range(num_ranks)
        ]
        self.flying: list[tuple[int, bytes]] = []  # (to, data)
        self.dropped = 0

    def send(self, pairs: Iterable[tuple[int, Message]]) -> None:
        self.flying += [(to, encode(message)) for to, message in pairs]

    def deliver(self, to: int, data: bytes, refusal: str | None = None) -> None:
        message = decode(data)
        if isinstance(message, CasRequest):
            answer = self.ledgers[to].request(to, message, refusal)
            self.send([(message.rank, answer)])
        elif isinstance(message, CasRelease):
            self.ledgers[to].release(message)
        elif isinstance(message, CasGrant | CasDecline):
            self.send(self.negotiations[to].on_message(message))
        else:
            self.dropped += 1

    def pick(self, data: st.DataObject) -> int:
        # Mostly from the front: else little ever gets through.
        last = len(self.flying) - 1
        return min(last, data.draw(st.one_of(st.just(0), st.integers(0, last))))

    @rule(data=st.data(), rows=st.integers(1, 6))
    def begin(self, data: st.DataObject, rows: int) -> None:
        self.send(data.draw(st.sampled_from(self.negotiations)).begin(rows))

    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        self.send(data.draw(st.sampled_from(self.negotiations)).abandon())

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), count=st.integers(1, 6), refusal=st.sampled_from([None, None, "busy"]))
    def arrive(self, data: st.DataObject, count: int, refusal: str | None) -> None:
        for _ in range(min(count, len(self.flying))):
            self.deliver(*self.flying.pop(self.pick(data)), refusal)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.flying.pop(self.pick(data))

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def double(self, data: st.DataObject) -> None:
        self.flying.append(self.flying[self.pick(data)])

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), field=st.sampled_from(["v", "kind", "rank", "step"]))
    def garble(self, data: st.DataObject, field: str) -> None:
        to, message = self.flying[self.pick(data)]
        if decode(message) is None:
            return
        values = orjson.loads(message)
        values[field] = data.draw(st.sampled_from([None, True, -1, 0.5, "x", []]))
        self.flying.append((to, orjson.dumps(values)))
        self.flying.append((to, message[: data.draw(st.integers(0, len(message) - 1))]))

    @rule(data=st.data(), noise=st.binary(max_size=10))
    def inject(self, data: st.DataObject, noise: bytes) -> None:
        self.flying.append((data.draw(st.integers(0, len(self.ledgers) - 1)), noise))

    def flow(self) -> None:
        """All that is under way arrives; it causes answers and releases, but no endless talk."""
        budget = 3 * len(self.flying)
        while self.flying:
            assert budget > 0
            budget -= 1
            self.deliver(*self.flying.pop(0))

    @rule(data=st.data(), rows=st.integers(1, 6))
    def quiet(self, data: st.DataObject, rows: int) -> None:
        """When messages flow again, a rank that begins anew gets its rows if they are there."""
        self.flow()
        negotiation = data.draw(st.sampled_from(self.negotiations))
        rank = self.negotiations.index(negotiation)
        fits = all(
            has_room(ledger, rank, rows)
            for owner, ledger in enumerate(self.ledgers)
            if owner != rank
        )
        self.send(negotiation.begin(rows))
        self.flow()
        assert negotiation.is_decided
        assert negotiation.is_granted == fits

    @rule()
    def end(self) -> None:
        """Once every rank has asked and released with messages flowing, nothing is leased."""
        for negotiation in self.negotiations:
            self.send(negotiation.begin(1))
            self.flow()
            self.send(negotiation.abandon())
            self.flow()
        assert all(ledger.leases() == {} for ledger in self.ledgers)

    @invariant()
    def ledgers_are_sound(self) -> None:
        for ledger in getattr(self, "ledgers", []):
            assert_sound(ledger)

    @invariant()
    def no_two_ranks_believe_in_the_same_row(self) -> None:
        granted = [n for n in getattr(self, "negotiations", []) if n.is_granted]
        for one, other in combinations(granted, 2):
            for owner in one.offsets.keys() & other.offsets.keys():
                first, second = one.offsets[owner], other.offsets[owner]
                assert first + one.rows <= second or second + other.rows <= first

    @invariant()
    def every_belief_is_a_lease(self) -> None:
        for rank, negotiation in enumerate(getattr(self, "negotiations", [])):
            for owner, offset in negotiation.offsets.items():
                lease = self.ledgers[owner].leases()[rank]
                assert lease == (negotiation.step, offset, negotiation.rows)


def has_room(ledger: LeaseLedger, rank: int, rows: int) -> bool:
    """Whether `rows` rows beside each other are free, once the rank's own lease has ended."""
    taken = [False] * ledger.capacity_rows
    for holder, (_, offset, leased) in ledger.leases().items():
        if holder != rank:
            taken[offset : offset + leased] = [True] * leased
    firsts = range(ledger.capacity_rows - rows + 1)
    return any(not any(taken[first : first + rows]) for first in firsts)


TestNetwork = Network.TestCase
TestNetwork.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

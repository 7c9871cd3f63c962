"""The control planes of two or three ranks over real sockets: leases, silence, states."""

import time
from dataclasses import replace

import pytest

from sidp_sgl.scheduler import bus, control, state_receiver
from sidp_sgl.scheduler.messages import CasRelease, CasRequest, StateUpdate
from sidp_sgl.scheduler.state_receiver import StateReceiver
from tests.support.control import (
    AMPLE_SECONDS,
    Rank,
    make_state,
    ranks_in,
    wait_until,
)


@pytest.fixture(autouse=True)
def threads_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(state_receiver, "_POLL_SECONDS", 0.01)


def test_rows_are_leased_when_all_owners_have_granted(engine_name: str) -> None:
    with ranks_in(engine_name, 3) as ranks:
        assert ranks[0].control.leases(4, AMPLE_SECONDS) == {1: 0, 2: 0}
        assert ranks[1].control.leases(6, AMPLE_SECONDS) == {0: 0, 2: 4}, "beside the other's"
        assert ranks[2].ledger.leases() == {0: (1, 0, 4), 1: (1, 4, 6)}
        assert ranks[0].control.negotiation.granted == 1
        assert ranks[0].control.silences == 0
        ranks[0].control.release()
        wait_until(lambda: ranks[2].ledger.leases() == {1: (1, 4, 6)})
        assert ranks[1].ledger.leases() == {}


def test_a_decline_ends_the_wait_and_frees_what_others_granted(engine_name: str) -> None:
    with ranks_in(engine_name, 3) as ranks:
        ranks[2].refusal = "busy"
        started = time.monotonic()
        assert ranks[0].control.leases(4, AMPLE_SECONDS) is None
        assert time.monotonic() - started < AMPLE_SECONDS / 2
        assert ranks[2].thread.declines == {"busy": 1}
        wait_until(lambda: ranks[1].thread._ledger._closed.get(0) == 1)
        assert ranks[1].ledger.leases() == ranks[2].ledger.leases() == {}
        ranks[2].refusal = None
        assert ranks[0].control.leases(4, AMPLE_SECONDS) == {1: 0, 2: 0}
        assert (ranks[0].control.negotiation.declined, ranks[0].control.silences) == (1, 0)


def test_a_full_staging_area_is_a_decline_with_its_reason(engine_name: str) -> None:
    with ranks_in(engine_name, 3, capacity_rows=8) as ranks:
        assert ranks[0].control.leases(6, AMPLE_SECONDS) is not None
        assert ranks[1].control.leases(4, AMPLE_SECONDS) is None
        assert ranks[1].control.leases(9, AMPLE_SECONDS) is None
        # The first decline decides: the other owner's may still be on its way.
        both = {"staging full": 1, "too many rows": 1}
        wait_until(lambda: ranks[2].thread.declines == both)
        wait_until(lambda: ranks[0].thread.declines == {"too many rows": 1})


def test_silence_is_waited_for_within_its_bound(engine_name: str) -> None:
    with ranks_in(engine_name, 3, is_listening=lambda rank: rank == 1) as ranks:
        started = time.monotonic()
        assert ranks[0].control.leases(4, 0.05) is None
        assert 0.045 < time.monotonic() - started < AMPLE_SECONDS
        assert ranks[0].control.silences == 1
        assert ranks[0].control.wait_seconds > 0.045
        wait_until(lambda: ranks[1].ledger._closed.get(0) == 1)
        assert ranks[1].ledger.leases() == {}, "what the others granted is given back"


def test_an_owner_that_goes_on_leaves_no_lease_of_what_was_given_up(engine_name: str) -> None:
    with ranks_in(engine_name, 2, is_listening=lambda rank: rank == 0) as ranks:
        for _ in range(3):
            assert ranks[0].control.leases(4, 0.01) is None
        ranks[1].thread.start()
        wait_until(lambda: ranks[1].ledger._closed.get(0) == 3)
        assert ranks[1].ledger.leases() == {}
        assert ranks[0].control.leases(4, AMPLE_SECONDS) == {1: 0}
        assert ranks[0].control.negotiation.stale == 3
        assert ranks[1].ledger.leases() == {0: (4, 0, 4)}


def test_a_late_grant_is_given_back_where_its_release_was_lost(engine_name: str) -> None:
    with ranks_in(engine_name, 2, is_listening=lambda rank: rank == 0) as ranks:
        ranks[0].loses_releases = True
        assert ranks[0].control.leases(4, 0.01) is None
        ranks[0].loses_releases = False
        ranks[1].thread.start()
        wait_until(lambda: ranks[1].ledger.leased_rows == 4)

        def is_given_back() -> bool:
            ranks[0].control._receive()
            return ranks[1].ledger.leased_rows == 0

        wait_until(is_given_back)
        assert ranks[0].control.negotiation.stale == 1


def test_a_lease_that_was_never_released_ends_with_the_ranks_next_request(engine_name: str) -> None:
    with ranks_in(engine_name, 2, capacity_rows=8) as ranks:
        ranks[0].loses_releases = True
        for step in range(1, 6):
            assert ranks[0].control.leases(5, AMPLE_SECONDS) == {1: 0}
            assert ranks[1].ledger.leases() == {0: (step, 0, 5)}
            ranks[0].control.release()


def test_a_rank_that_ends_without_a_release_holds_its_own_rows_only(engine_name: str) -> None:
    with ranks_in(engine_name, 3, capacity_rows=8) as ranks:
        assert ranks[0].control.leases(5, AMPLE_SECONDS) is not None
        ranks[0].control.close()
        ranks[0].thread.close()
        assert ranks[1].control.leases(3, 0.05) is None, "the rank itself is silent"
        assert ranks[2].ledger.leases()[0] == (1, 0, 5)
        wait_until(lambda: list(ranks[2].ledger.leases()) == [0])
        assert "staging full" not in ranks[2].thread.declines


def test_rows_that_were_asked_for_ahead_are_used_if_they_suffice(engine_name: str) -> None:
    with ranks_in(engine_name, 2) as ranks:
        requester = ranks[0].control
        requester.ask(8)
        assert requester.leases(5, AMPLE_SECONDS) == {1: 0}
        assert requester.leases(8, AMPLE_SECONDS) == {1: 0}
        assert requester.negotiation.requests == 1
        assert requester.leases(9, AMPLE_SECONDS) == {1: 0}
        assert requester.negotiation.requests == 2
        assert ranks[1].ledger.leases() == {0: (2, 0, 9)}


def test_a_rank_that_needs_nobody_waits_for_nobody(engine_name: str) -> None:
    with ranks_in(engine_name, 2, is_listening=lambda rank: False):
        rank = Rank(2, 3, engine_name, owners=[], capacity_rows=8)
        assert rank.control.leases(4, 0.0) == {}
        assert rank.sent == []
        rank.control.close()
        rank.thread.inbox.close()
        rank.thread._answers.close()


def test_what_is_nobodys_or_nonsense_does_not_stop_the_thread(engine_name: str) -> None:
    with ranks_in(engine_name, 2) as ranks:
        strange = bus.Outbox({1: bus.control_address(engine_name, 1)})
        strange.send(1, CasRequest(1, 1, 4))  # from itself
        strange.send(1, CasRequest(7, 1, 4))  # from a rank that does not exist
        strange.send(1, CasRelease(7, 9))
        strange.send_bytes(1, b"?")
        wait_until(lambda: ranks[1].thread.inbox.malformed == 1)
        assert ranks[1].ledger.leases() == {}
        assert ranks[0].control.leases(4, AMPLE_SECONDS) == {1: 0}
        strange.close()


def test_states_reach_all_other_ranks_and_the_controller(engine_name: str) -> None:
    receiver = StateReceiver(engine_name)
    with ranks_in(engine_name, 3) as ranks:
        for number, rank in enumerate(ranks):
            rank.control.publish(make_state(number, 1, running=number), 0.0)
        for number, rank in enumerate(ranks):
            others = [make_state(n, 1, running=n) for n in range(3) if n != number]
            wait_until(lambda rank=rank, others=others: rank.thread.group.all() == others)
        wait_until(lambda: receiver.group.all() == [make_state(n, 1, running=n) for n in range(3)])
        ranks[1].control.publish(make_state(1, 2, running=9), 0.0)
        for group in (ranks[0].thread.group, ranks[2].thread.group, receiver.group):
            wait_until(lambda group=group: group.of(1) == make_state(1, 2, running=9))
        assert ranks[0].control.dropped == 0
    receiver.close()


def test_an_older_state_that_comes_later_changes_nothing(engine_name: str) -> None:
    receiver = StateReceiver(engine_name)
    outbox = bus.Outbox({0: bus.controller_address(engine_name)})
    for number in (5, 4, 6):
        outbox.send(0, StateUpdate(make_state(2, number, running=number)))
        if number == 4:
            outbox.send_bytes(0, b"?")
            outbox.send(0, CasRelease(2, 1))  # not for the controller
            wait_until(lambda: receiver._inbox.malformed == 1)
            assert receiver.group.all() == [make_state(2, 5, running=5)]
    wait_until(lambda: receiver.group.all() == [make_state(2, 6, running=6)])
    receiver.close()
    outbox.close()


def test_nothing_is_sent_while_nothing_changes(engine_name: str) -> None:
    with ranks_in(engine_name, 2) as ranks:
        sent: list[StateUpdate] = []
        ranks[0].control._outbox.send_to_all = sent.append  # type: ignore[method-assign,assignment]
        state = make_state(0, 1)
        for number in range(100):
            ranks[0].control.publish(replace(state, number=number), now=float(number))
        assert sent == [StateUpdate(replace(state, number=0))]
        ranks[0].control.publish(replace(state, number=100, waiting_requests=1), now=100.0)
        assert len(sent) == 2
        assert ranks[0].sent == [], "nor is anything asked or released"


def test_a_receiver_of_states_that_is_stopped_holds_up_nobody(engine_name: str) -> None:
    with ranks_in(engine_name, 2, is_listening=lambda rank: False) as ranks:
        started = time.monotonic()
        for number in range(5000):
            ranks[0].control.publish(make_state(0, number, running=number), 0.0)
        assert time.monotonic() - started < 5.0
        assert ranks[0].control.dropped > 0

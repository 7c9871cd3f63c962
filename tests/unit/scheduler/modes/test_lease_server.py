"""Leases between two or three ranks over real sockets: granted, declined, late, lost, never."""

import time

import pytest

from sidp_sgl.scheduler import bus
from sidp_sgl.scheduler.messages import LeaseRequest
from sidp_sgl.scheduler.modes import lease_server
from tests.support.control import AMPLE_SECONDS, Rank, ranks_in, wait_until


@pytest.fixture(autouse=True)
def threads_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_server, "_POLL_SECONDS", 0.01)


def test_rows_are_leased_when_all_owners_have_granted(engine_name: str) -> None:
    with ranks_in(engine_name, 3) as ranks:
        assert ranks[0].client.acquire(4, AMPLE_SECONDS)
        assert ranks[1].client.acquire(6, AMPLE_SECONDS), "it has rows of its own"
        assert ranks[0].client.negotiation.granted == 1
        assert ranks[0].client.silences == 0


def test_a_decline_ends_the_wait(engine_name: str) -> None:
    with ranks_in(engine_name, 3) as ranks:
        ranks[2].refusal = "busy"
        started = time.monotonic()
        assert not ranks[0].client.acquire(4, AMPLE_SECONDS)
        assert time.monotonic() - started < AMPLE_SECONDS / 2
        assert ranks[2].server.declines == {"busy": 1}
        ranks[2].refusal = None
        assert ranks[0].client.acquire(4, AMPLE_SECONDS)
        assert (ranks[0].client.negotiation.declined, ranks[0].client.silences) == (1, 0)


def test_too_many_rows_are_a_decline_with_its_reason(engine_name: str) -> None:
    with ranks_in(engine_name, 3, rows_per_rank=8) as ranks:
        assert ranks[0].client.acquire(8, AMPLE_SECONDS)
        assert not ranks[1].client.acquire(9, AMPLE_SECONDS)
        # The first decline decides: the other owner's may still be on its way.
        wait_until(lambda: ranks[2].server.declines == {"too many rows": 1})
        wait_until(lambda: ranks[0].server.declines == {"too many rows": 1})


def test_silence_is_waited_for_within_its_bound(engine_name: str) -> None:
    with ranks_in(engine_name, 3, is_listening=lambda rank: rank == 1) as ranks:
        started = time.monotonic()
        assert not ranks[0].client.acquire(4, 0.05)
        assert 0.045 < time.monotonic() - started < AMPLE_SECONDS
        assert ranks[0].client.silences == 1
        assert ranks[0].client.wait_seconds > 0.045


def test_an_owner_that_goes_on_grants_nothing_of_what_was_given_up(engine_name: str) -> None:
    with ranks_in(engine_name, 2, is_listening=lambda rank: rank == 0) as ranks:
        for _ in range(3):
            assert not ranks[0].client.acquire(4, 0.01)
        ranks[1].server.start()
        assert ranks[0].client.acquire(4, AMPLE_SECONDS)
        assert ranks[0].client.negotiation.stale == 3


def test_rows_that_were_asked_for_ahead_are_used_if_they_suffice(engine_name: str) -> None:
    with ranks_in(engine_name, 2) as ranks:
        requester = ranks[0].client
        requester.ask(8)
        assert requester.acquire(5, AMPLE_SECONDS)
        assert requester.acquire(8, AMPLE_SECONDS)
        assert requester.negotiation.requests == 1
        assert requester.acquire(9, AMPLE_SECONDS)
        assert requester.negotiation.requests == 2


def test_a_rank_that_needs_nobody_waits_for_nobody(engine_name: str) -> None:
    with ranks_in(engine_name, 2, is_listening=lambda rank: False):
        rank = Rank(2, 3, engine_name, owners=[], rows_per_rank=8)
        assert rank.client.acquire(4, 0.0)
        assert rank.sent == []
        rank.client.close()
        rank.server.inbox.close()
        rank.server.outbox.close()


def test_what_is_nobodys_or_nonsense_does_not_stop_the_thread(engine_name: str) -> None:
    with ranks_in(engine_name, 2) as ranks:
        strange = bus.Outbox({1: bus.requests_address(engine_name, 1)})
        strange.send(1, LeaseRequest(1, 1, 4))  # from itself
        strange.send(1, LeaseRequest(7, 1, 4))  # from a rank that does not exist
        strange.send_bytes(1, b"?")
        wait_until(lambda: ranks[1].server.inbox.malformed == 1)
        assert ranks[0].client.acquire(4, AMPLE_SECONDS)
        strange.close()

"""Leases on staging rows: one per rank, in rows of its own, whatever comes in which order."""

from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.scheduler.messages import LeaseDecline, LeaseGrant, LeaseRelease, LeaseRequest
from sidp_sgl.scheduler.modes.leases import LeaseLedger

OWNER = 9


def ask(
    ledger: LeaseLedger, rank: int, step: int, rows: int, refusal: str | None = None
) -> int | str:
    """The offset that is granted, or the reason why not."""
    answer = ledger.request(OWNER, LeaseRequest(rank, step, rows), refusal)
    assert (answer.owner, answer.rank, answer.step) == (OWNER, rank, step)
    if isinstance(answer, LeaseGrant):
        assert answer.rows == rows
        return answer.offset
    return answer.reason


def assert_sound(ledger: LeaseLedger, owner: int = OWNER) -> None:
    """Every lease lies in the rows that are its rank's own, of (ranks - 1) times as many."""
    for rank, (_, offset, rows) in ledger.leases().items():
        place = rank if rank < owner else rank - 1
        assert offset == place * ledger.rows_per_rank
        assert 1 <= rows <= ledger.rows_per_rank


def test_every_rank_has_rows_of_its_own() -> None:
    """Also when it asks anew: TP ranks above 0 may be in the step before still."""
    ledger = LeaseLedger(10)
    for step in (1, 2):
        assert [ask(ledger, rank, step, 3) for rank in range(3)] == [0, 10, 20]
    ledger.release(LeaseRelease(1, 2))
    assert ask(ledger, 3, 1, 10) == 30
    assert ask(ledger, 3, 2, 11) == "too many rows"
    assert ledger.leases() == {0: (2, 0, 3), 2: (2, 20, 3)}
    assert ledger.request(1, LeaseRequest(2, 3, 4)) == LeaseGrant(1, 2, 3, 10, 4)


def test_a_duplicate_request_gets_the_same_grant() -> None:
    ledger = LeaseLedger(10)
    assert ask(ledger, 0, 1, 4) == 0
    assert ask(ledger, 1, 1, 4) == 10
    ledger.release(LeaseRelease(0, 1))
    assert ask(ledger, 1, 1, 4) == 10
    assert ask(ledger, 1, 1, 4, refusal="busy") == 10, "it was granted already"
    assert ledger.leases() == {1: (1, 10, 4)}


def test_a_duplicate_of_a_declined_request_is_declined() -> None:
    ledger = LeaseLedger(10)
    assert ask(ledger, 0, 1, 4, refusal="busy") == "busy"
    assert ask(ledger, 0, 1, 4) == "busy"
    assert ledger.leases() == {}


def test_a_step_asks_once() -> None:
    ledger = LeaseLedger(10)
    assert ask(ledger, 0, 1, 4) == 0
    assert ask(ledger, 0, 1, 5) == "stale"
    assert ledger.leases() == {0: (1, 0, 4)}


def test_a_newer_request_supersedes_whatever_its_outcome() -> None:
    ledger = LeaseLedger(10)
    assert ask(ledger, 0, 1, 10) == 0
    assert ask(ledger, 0, 2, 10) == 0, "its own rows are free for it"
    for step, (rows, refusal) in enumerate([(11, None), (0, None), (4, "busy")], start=3):
        reason = ask(ledger, 0, 2 * step, rows, refusal)
        assert reason == refusal or reason in ("too many rows", "no rows")
        assert ledger.leases() == {}
        assert ask(ledger, 0, 2 * step + 1, 10) == 0


def test_an_older_step_is_stale() -> None:
    ledger = LeaseLedger(10)
    assert ask(ledger, 0, 5, 4) == 0
    assert ask(ledger, 0, 4, 4) == "stale"
    ledger.release(LeaseRelease(0, 4))
    assert ledger.leases() == {0: (5, 0, 4)}, "an old release frees nothing newer"


def test_a_request_that_comes_after_its_release_is_stale() -> None:
    ledger = LeaseLedger(10)
    ledger.release(LeaseRelease(0, 5))
    assert ask(ledger, 0, 5, 4) == "stale"
    assert ask(ledger, 0, 4, 4) == "stale"
    assert ledger.leases() == {}
    assert ask(ledger, 0, 6, 4) == 0


def test_a_released_step_is_over_for_its_duplicates_too() -> None:
    ledger = LeaseLedger(10)
    assert ask(ledger, 0, 5, 4) == 0
    ledger.release(LeaseRelease(0, 5))
    assert ask(ledger, 0, 5, 4) == "stale"


def test_a_release_ends_an_older_steps_lease() -> None:
    """The request of the newer step was lost: the lease would stay until the rank asks again."""
    ledger = LeaseLedger(10)
    assert ask(ledger, 0, 5, 4) == 0
    ledger.release(LeaseRelease(0, 6))
    assert ledger.leases() == {}


@given(
    st.integers(0, 12),
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 4),
            st.integers(0, 8),
            st.integers(0, 14),
            st.sampled_from([None, None, "busy"]),
        ),
        max_size=60,
    ),
)
def test_leases_are_sound_and_end_only_by_their_own_rank(
    rows_per_rank: int, events: list[tuple[bool, int, int, int, str | None]]
) -> None:
    ledger = LeaseLedger(rows_per_rank)
    outcomes: dict[LeaseRequest, LeaseGrant | LeaseDecline] = {}
    for is_request, rank, step, rows, refusal in events:
        before = ledger.leases()
        if is_request:
            message = LeaseRequest(rank, step, rows)
            answer = ledger.request(OWNER, message, refusal)
            granted = (step, answer.offset, rows) if isinstance(answer, LeaseGrant) else None
            if granted:
                assert ledger.leases()[rank] == granted
                assert outcomes.setdefault(message, answer) == answer, "one step, one grant"
            else:
                outcomes[message] = answer
                assert ledger.leases().get(rank, (step + 1,))[0] >= step, "no older one is left"
        else:
            ledger.release(LeaseRelease(rank, step))
            assert ledger.leases().get(rank, (step + 1,))[0] > step
        assert_sound(ledger)
        after = ledger.leases()
        before.pop(rank, None), after.pop(rank, None)
        assert after == before

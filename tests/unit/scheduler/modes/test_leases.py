"""What owners answer: rows of its own for every rank, or the reason why not."""

from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.scheduler.messages import LeaseDecline, LeaseGrant, LeaseRequest
from sidp_sgl.scheduler.modes.leases import answer

RANKS, ROWS = st.integers(0, 8), st.integers(0, 14)


def test_every_rank_has_rows_of_its_own() -> None:
    def first(owner: int, rank: int) -> int:
        granted = answer(owner, LeaseRequest(rank, 1, 3), rows_per_rank=10)
        assert isinstance(granted, LeaseGrant)
        return granted.offset

    assert [first(9, rank) for rank in range(4)] == [0, 10, 20, 30]
    assert [first(1, rank) for rank in (0, 2, 3)] == [0, 10, 20]


def test_a_decline_says_why() -> None:
    for rows, refusal, reason in [
        (11, None, "too many rows"),
        (0, None, "no rows"),
        (4, "busy", "busy"),
        (11, "busy", "busy"),
    ]:
        said = answer(9, LeaseRequest(0, 2, rows), 10, refusal)
        assert said == LeaseDecline(9, 0, 2, reason)


@given(RANKS, st.lists(st.tuples(RANKS, ROWS), max_size=20), ROWS)
def test_no_two_ranks_ever_have_the_same_row(
    owner: int, asked: list[tuple[int, int]], rows_per_rank: int
) -> None:
    """Whoever asks, for whatever, in whatever order."""
    holders: dict[int, int] = {}  # by row
    for step, (rank, rows) in enumerate(asked):
        if rank == owner:
            continue
        said = answer(owner, LeaseRequest(rank, step, rows), rows_per_rank)
        assert isinstance(said, LeaseGrant) == (1 <= rows <= rows_per_rank)
        if isinstance(said, LeaseGrant):
            assert (said.rank, said.step, said.rows) == (rank, step, rows)
            for row in range(said.offset, said.offset + rows):
                assert holders.setdefault(row, rank) == rank
    assert max(holders, default=-1) < 8 * rows_per_rank

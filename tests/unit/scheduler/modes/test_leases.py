"""What owners answer: the rows that a rank has there, or the reason why not."""

from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.scheduler.messages import LeaseDecline, LeaseGrant, LeaseRequest
from sidp_sgl.scheduler.modes.leases import answer

RANKS, ROWS = st.integers(0, 8), st.integers(0, 14)


def test_a_decline_says_why() -> None:
    for rows, refusal, reason in [
        (11, None, "too many rows"),
        (0, None, "no rows"),
        (4, "busy", "busy"),
        (11, "busy", "busy"),
    ]:
        said = answer(9, LeaseRequest(0, 2, rows), 10, refusal)
        assert said == LeaseDecline(9, 0, 2, reason)


@given(RANKS, RANKS, ROWS, ROWS)
def test_a_rank_may_have_as_many_rows_as_are_its_own(
    owner: int, rank: int, rows: int, rows_per_rank: int
) -> None:
    said = answer(owner, LeaseRequest(rank, 3, rows), rows_per_rank)
    if 1 <= rows <= rows_per_rank:
        assert said == LeaseGrant(owner, rank, 3, rows)
    else:
        assert isinstance(said, LeaseDecline)

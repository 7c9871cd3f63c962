"""How much memory a rank sets aside for rows: those that others send, and its own results.

Needs no torch: the planner counts with it as well.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sidp_sgl.weightpool.alignment import align

ROWS_PER_RANK = 64  # of one step; a larger batch is never sent


@dataclass(frozen=True)
class Staging:
    """`capacity_rows` of `row_bytes` each are leased to requesters. Results need no lease, for a
    rank has one call open at a time; each of the `num_stripes` owners that a call may go to has
    `result_bytes` of them."""

    capacity_rows: int
    row_bytes: int  # of the widest unit's payload
    result_bytes: int
    num_stripes: int = 1

    @property
    def inbox_bytes(self) -> int:
        return self.capacity_rows * self.row_bytes

    @property
    def results_bytes(self) -> int:
        return self.num_stripes * self.result_bytes

    @property
    def num_bytes(self) -> int:
        return self.inbox_bytes + self.results_bytes


def capacity_rows(num_ranks: int) -> int:
    """Rows of an owner's inbox: every other rank may lease ROWS_PER_RANK."""
    return (num_ranks - 1) * ROWS_PER_RANK


def first_row(owner: int, requester: int) -> int:
    """Of `requester`'s own rows in the inbox of `owner`: one rank's lie behind the other's."""
    return (requester - (requester > owner)) * ROWS_PER_RANK


def make_staging(
    row_bytes: Iterable[tuple[int, int]], num_ranks: int, num_stripes: int = 1
) -> Staging:
    """For units with rows of these sizes in bytes, of payload and result, and blocks of at most
    `num_stripes`; the same on every rank."""
    sizes = list(row_bytes)
    incoming = max((size[0] for size in sizes), default=0)
    outgoing = max((size[1] for size in sizes), default=0)
    return Staging(
        capacity_rows=capacity_rows(num_ranks),
        row_bytes=align(incoming),
        result_bytes=align(ROWS_PER_RANK * outgoing),
        num_stripes=num_stripes,
    )

"""How much memory a rank sets aside for rows: those that others send, and its own results.

Needs no torch: the planner counts with it as well.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sidp_sgl.weightpool.alignment import align

ROWS_PER_RANK = 64  # of one step; where batches are larger, streaming weights is cheaper


@dataclass(frozen=True)
class Staging:
    """`capacity_rows` of `row_bytes` each are leased to requesters; results need no lease, for a
    rank has one call open at a time."""

    capacity_rows: int
    row_bytes: int  # of the widest unit's input
    results_bytes: int

    @property
    def inbox_bytes(self) -> int:
        return self.capacity_rows * self.row_bytes

    @property
    def num_bytes(self) -> int:
        return self.inbox_bytes + self.results_bytes


def capacity_rows(num_ranks: int) -> int:
    """Rows of an owner's inbox: every other rank may lease ROWS_PER_RANK."""
    return (num_ranks - 1) * ROWS_PER_RANK


def make_staging(row_bytes: Iterable[tuple[int, int]], num_ranks: int) -> Staging:
    """For units with rows of these sizes in bytes, of input and result; the same on every rank."""
    sizes = list(row_bytes)
    incoming = max((size[0] for size in sizes), default=0)
    outgoing = max((size[1] for size in sizes), default=0)
    return Staging(
        capacity_rows=capacity_rows(num_ranks),
        row_bytes=align(incoming),
        results_bytes=align(ROWS_PER_RANK * outgoing),
    )

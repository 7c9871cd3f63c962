"""How much memory a rank sets aside for rows: those that others send, and its own results.

Needs no torch: the planner counts with it as well.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sidp_sgl.weightpool.alignment import align

# Rows of one step that another rank may send; more are never sent.
LEAST_ROWS, MOST_ROWS = 64, 512
_BLOCK_SHARE = 1 / 8  # of a block, in which all rows beyond LEAST_ROWS must fit


@dataclass(frozen=True)
class Staging:
    """`rows_per_rank` of `row_bytes` each are leased to every requester. Results need no lease, for
    a rank has one call open at a time; each of the `num_stripes` owners that a call may go to has
    `result_bytes` of them."""

    num_ranks: int
    rows_per_rank: int
    row_bytes: int  # of the widest unit's payload
    result_bytes: int
    num_stripes: int = 1

    @property
    def inbox_bytes(self) -> int:
        return (self.num_ranks - 1) * self.rows_per_rank * self.row_bytes

    @property
    def results_bytes(self) -> int:
        return self.num_stripes * self.result_bytes

    @property
    def num_bytes(self) -> int:
        return self.inbox_bytes + self.results_bytes

    def offset(self, owner: int, requester: int) -> int:
        """Of `requester`'s own rows in the inbox of `owner`, in bytes: one rank's lie behind the
        other's."""
        return (requester - (requester > owner)) * self.rows_per_rank * self.row_bytes


def make_staging(
    row_bytes: Iterable[tuple[int, int]],
    num_ranks: int,
    num_stripes: int = 1,
    block_bytes: int = 0,
) -> Staging:
    """For units with rows of these sizes in bytes, of payload and result, and blocks of at most
    `block_bytes` and `num_stripes`; the same on every rank. Its rows are a power of two."""
    sizes = list(row_bytes)
    incoming = align(max((size[0] for size in sizes), default=0))
    outgoing = max((size[1] for size in sizes), default=0)
    rows, per_row = LEAST_ROWS, (num_ranks - 1) * incoming + num_stripes * outgoing
    while rows < MOST_ROWS and 2 * rows * per_row <= _BLOCK_SHARE * block_bytes:
        rows *= 2
    return Staging(num_ranks, rows, incoming, align(rows * outgoing), num_stripes)

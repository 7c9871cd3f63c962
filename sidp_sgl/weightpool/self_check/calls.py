"""Calls to owners, compared with the same rows computed here from what was fetched: one per owner.

Results may be rounded differently, for an owner computes the rows of several ranks together; rows
that are lost, torn, stale or another's differ by as much as they are large.
"""

from functools import partial

import torch

from sidp_sgl.errors import SidpError
from sidp_sgl.weightpool.cas.requester import Requester
from sidp_sgl.weightpool.cas.unit import PooledUnit, RowType
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.transport.interface import WAIT_SECONDS

ROWS = 8
TOLERANCE = 0.1  # of a row's length


class CallCheck:
    """`visit` each block while it is in its slot; when no rank is starting any more, `call`."""

    def __init__(self, pool: WeightPool, requester: Requester, units: list[PooledUnit]) -> None:
        self._pool = pool
        self._requester = requester
        self._units = choose(pool, units)
        self._rows = {n: make_payload(unit, pool.rank) for n, unit in self._units.items()}
        self._expected: dict[int, torch.Tensor] = {}

    @property
    def num_owners(self) -> int:
        return len(self._units)

    def visit(self, block: int) -> None:
        """Compute here what `block`'s owner will be asked for."""
        for owner, unit in self._units.items():
            if unit.block == block:
                self._pool.transport.compute_stream.launch(partial(self._take, owner, unit))

    def _take(self, owner: int, unit: PooledUnit) -> None:
        self._expected[owner] = unit.partial(*self._payload(owner)).clone()

    def _payload(self, owner: int) -> list[torch.Tensor]:
        """Anew, for some units compute in place."""
        device = self._pool.prefetcher.slots[0].memory.device
        return [rows.to(device, copy=True) for rows in self._rows[owner]]

    def call(self) -> None:
        """Raises SidpError where an owner is silent or computes something else."""
        self._requester.begin_step(ROWS)
        try:
            for owner, unit in self._units.items():
                owners = self._pool.owners(unit.block)
                payload = self._payload(owner)
                result = self._requester.call(owners, unit, payload, patience=WAIT_SECONDS)
                self._compare(owner, unit.block, result)
        finally:
            self._requester.end_step()

    def _compare(self, owner: int, block: int, result: torch.Tensor | None) -> None:
        self._pool.transport.synchronize()
        if result is None:
            raise SidpError(
                f"--sidp-self-check: DP rank {owner} has not computed rows of DP rank "
                f"{self._pool.rank} for its block {block} (CaS): see its log, or use "
                "--sidp-mode was"
            )
        if not is_alike(result, self._expected[owner]):
            raise SidpError(
                f"--sidp-self-check: DP rank {owner} computes other results for its block {block} "
                f"than DP rank {self._pool.rank} does (CaS): use --sidp-mode was, and report it"
            )


def choose(pool: WeightPool, units: list[PooledUnit]) -> dict[int, PooledUnit]:
    """Owner → a unit of a block that is fetched here and that it holds a part of."""
    fetched = set(pool.placement.fetched(pool.rank))
    chosen: dict[int, PooledUnit] = {}
    for unit in units:
        for owner in pool.owners(unit.block):
            if owner != pool.rank and unit.block in fetched:
                chosen.setdefault(owner, unit)
    return chosen


def make_payload(unit: PooledUnit, seed: int) -> list[torch.Tensor]:
    """Random rows; whole numbers are the ids of the first experts, which all mixtures have."""
    generator = torch.Generator().manual_seed(seed)

    def rows(kind: RowType) -> torch.Tensor:
        if not kind.dtype.is_floating_point:
            return torch.arange(kind.width, dtype=kind.dtype).repeat(ROWS, 1)
        return torch.randn(ROWS, kind.width, generator=generator).to(kind.dtype)

    return [rows(kind) for kind in unit.payload]


def is_alike(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """Row by row, up to TOLERANCE; what is no number is none on both sides."""
    one, other = result.double(), expected.double()
    if not torch.equal(one.isfinite(), other.isfinite()):
        return False
    one, other = (rows.nan_to_num(0.0, 0.0, 0.0) for rows in (one, other))
    return bool(((one - other).norm(dim=1) <= TOLERANCE * other.norm(dim=1)).all())

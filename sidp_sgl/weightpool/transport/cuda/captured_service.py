"""What an owner's service computes for others, captured as CUDA graphs: a call costs the service
one launch, however many kernels the unit has. There is a graph per unit and batch bucket."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from sidp_sgl.weightpool.cas.staging import ROWS_PER_RANK
from sidp_sgl.weightpool.cas.unit import PooledUnit

BUCKETS = tuple(2**power for power in range(ROWS_PER_RANK.bit_length()))  # 1, 2, 4, …, 64 rows

# Work on the current stream → the launch of its graph.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def capture_units(
    units: Sequence[PooledUnit], device: torch.device, capture: Capture
) -> list[PooledUnit]:
    """`units` whose `compute` launches a graph; for one stream, the current one, for they share
    what they read and write: a result is valid until the next call."""
    size = max(BUCKETS)
    rows = _shared(units, lambda unit: size * unit.in_width, device)
    results = _shared(units, lambda unit: size * unit.out_width, device)
    return [replace(unit, compute=_CapturedUnit(unit, rows, results, capture)) for unit in units]


def _shared(
    units: Sequence[PooledUnit], count: Callable[[PooledUnit], int], device: torch.device
) -> torch.Tensor:
    num_bytes = max((count(unit) * unit.dtype.itemsize for unit in units), default=0)
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


class _CapturedUnit:
    """Rows beyond those of a call are what earlier calls have left: they only fill the bucket."""

    def __init__(
        self, unit: PooledUnit, rows: torch.Tensor, results: torch.Tensor, capture: Capture
    ) -> None:
        self._compute = unit.compute
        self._rows = _as_rows(rows, unit.in_width, unit.dtype)
        self._results = _as_rows(results, unit.out_width, unit.dtype)
        self._launches = [(bucket, capture(self._work(bucket))) for bucket in BUCKETS]

    def _work(self, bucket: int) -> Callable[[], None]:
        rows, results = self._rows[:bucket], self._results[:bucket]

        def work() -> None:
            results.copy_(self._compute(rows))

        return work

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        num_rows = len(rows)
        for bucket, launch in self._launches:
            if num_rows <= bucket:
                self._rows[:num_rows].copy_(rows)
                launch()
                return self._results[:num_rows]
        return self._compute(rows)  # rows of several ranks


def _as_rows(memory: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[64, width] at the beginning of `memory`."""
    size = max(BUCKETS)
    return memory[: size * width * dtype.itemsize].view(dtype).view(size, width)

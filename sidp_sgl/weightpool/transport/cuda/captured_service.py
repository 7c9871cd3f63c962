"""What an owner's service computes for others, captured as CUDA graphs: a call costs the service
one launch, however many kernels the unit has. There is a graph per unit and batch bucket."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from sidp_sgl.weightpool.cas.unit import PooledUnit, RowsViews

# Work on the current stream → the launch of its graph.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def capture_units(
    units: Sequence[PooledUnit], rows_per_rank: int, device: torch.device, capture: Capture
) -> list[PooledUnit]:
    """`units` whose `partial` launches a graph; for one stream, the current one, for they share
    what they read and write: a result is valid until the next call."""
    buckets = [2**power for power in range(rows_per_rank.bit_length())]  # 1, 2, 4, …
    payload = _shared([rows_per_rank * unit.row_bytes[0] for unit in units], device)
    results = _shared([rows_per_rank * unit.row_bytes[1] for unit in units], device)
    return [
        replace(unit, partial=_CapturedUnit(unit, buckets, payload, results, capture))
        for unit in units
    ]


def _shared(num_bytes: list[int], device: torch.device) -> RowsViews:
    return RowsViews(torch.zeros(max(num_bytes, default=0), dtype=torch.uint8, device=device))


class _CapturedUnit:
    """Rows beyond those of a call are what earlier calls have left: they only fill the bucket."""

    def __init__(
        self,
        unit: PooledUnit,
        buckets: Sequence[int],
        payload: RowsViews,
        results: RowsViews,
        capture: Capture,
    ) -> None:
        size = max(buckets)
        self._partial = unit.partial
        self._payload = payload.payload(unit, 0, size)  # [size, width] each
        self._results = results.view(0, size, unit.result)
        self._launches = [(bucket, capture(self._work(bucket))) for bucket in buckets]

    def _work(self, bucket: int) -> Callable[[], None]:
        payload, results = [rows[:bucket] for rows in self._payload], self._results[:bucket]

        def work() -> None:
            results.copy_(self._partial(*payload))

        return work

    def __call__(self, *payload: torch.Tensor) -> torch.Tensor:
        num_rows = len(payload[0])
        for bucket, launch in self._launches:
            if num_rows <= bucket:
                for own, rows in zip(self._payload, payload, strict=True):
                    own[:num_rows].copy_(rows)
                launch()
                return self._results[:num_rows]
        return self._partial(*payload)  # rows of several ranks

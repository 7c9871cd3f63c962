"""How one pooled unit is computed in a forward pass: with weights that are here, or by its owner.

In a CaS step a layer that happens to lie in a slot, because it was prefetched for the next WaS
step, is computed here and stays there: what was prefetched is used, and the slots stay as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sidp_sgl.weightpool.cas.requester import RemoteUnits
from sidp_sgl.weightpool.cas.unit import PooledUnit
from sidp_sgl.weightpool.pool import WeightPool

# Rows [num_rows, in_width] of a unit to its result's rows, [num_rows, out_width].
Call = Callable[[PooledUnit, torch.Tensor], torch.Tensor]


class UnitExecution:
    """`remote` is None where every step is a WaS step."""

    def __init__(self, pool: WeightPool, remote: RemoteUnits | None = None) -> None:
        self._pool = pool
        self._uses_pool = True
        self._captured_call: Call | None = None
        self.remote = remote

    @property
    def staging_bytes(self) -> int:
        """What calls take of this rank's device, in bytes."""
        return self.remote.staging.num_bytes if self.remote is not None else 0

    def run(self, unit: PooledUnit, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the unit's own forward would return; `rows`: [num_rows, in_width]."""
        if not self._uses_pool:
            return unit.forward(rows, *args, **kwargs)
        if self._captured_call is not None and not self._pool.owns(unit.layer):
            return unit.pack(self._captured_call(unit, rows))
        result = self._called(unit, rows)
        if result is not None:
            return unit.pack(result)
        self._pool.enter(unit.layer)
        result = unit.forward(rows, *args, **kwargs)
        self._leave(unit)
        return result

    def compute_into(self, result: torch.Tensor, unit: PooledUnit, rows: torch.Tensor) -> None:
        """The same into `result` [num_rows, out_width], between two parts of a captured CaS step;
        rows beyond those of the step only fill the graph's batch, and become zero."""
        remote = self.remote
        assert remote is not None
        num_rows = min(remote.step_rows, len(rows))
        if num_rows < len(rows):
            result[num_rows:].zero_()
        if self._called(unit, rows[:num_rows], result[:num_rows]) is None:
            self._pool.enter(unit.layer)
            result[:num_rows].copy_(unit.compute(rows[:num_rows]))
            self._leave(unit)

    def _called(
        self, unit: PooledUnit, rows: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The result where the unit's owner has computed it, in `out` where given."""
        pool, remote = self._pool, self.remote
        if remote is None or not remote.is_active or pool.holds(unit.layer):
            return None
        return remote.call(pool.owners[unit.layer], unit, rows, out)

    def _leave(self, unit: PooledUnit) -> None:
        if unit.is_last:
            keep = self.remote is not None and self.remote.is_active
            self._pool.leave(unit.layer, keep=keep)

    @contextmanager
    def capturing_calls(self, call: Call) -> Iterator[None]:
        """Inside, `call` stands for the units of other ranks' layers: a CaS step is captured."""
        self._captured_call = call
        try:
            yield
        finally:
            self._captured_call = None

    @contextmanager
    def weights_as_they_are(self) -> Iterator[None]:
        """Inside, units are computed with whatever lies in their slots, for timing only."""
        self._uses_pool = False
        try:
            yield
        finally:
            self._uses_pool = True

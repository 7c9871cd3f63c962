"""How one pooled unit is computed in a forward pass: with weights that are here, or by its owner.

In a CaS step a layer that happens to lie in a slot, because it was prefetched for the next WaS
step, is computed here and stays there: what was prefetched is used, and the slots stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.pooled_unit import PooledUnit
from sidp_sgl.weightpool.remote import RemoteUnits


class UnitExecution:
    """`remote` is None where every step is a WaS step."""

    def __init__(self, pool: WeightPool, remote: RemoteUnits | None = None) -> None:
        self._pool = pool
        self._uses_pool = True
        self.remote = remote

    @property
    def staging_bytes(self) -> int:
        """What calls take of this rank's device, in bytes."""
        return self.remote.staging.num_bytes if self.remote is not None else 0

    def run(self, unit: PooledUnit, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the unit's own forward would return; `rows`: [num_rows, in_width]."""
        if not self._uses_pool:
            return unit.forward(rows, *args, **kwargs)
        pool, remote = self._pool, self.remote
        if remote is not None and remote.is_active and not pool.holds(unit.layer):
            result = remote.call(pool.owners[unit.layer], unit, rows)
            if result is not None:
                return unit.pack(result)
        pool.enter(unit.layer)
        result = unit.forward(rows, *args, **kwargs)
        if unit.is_last:
            pool.leave(unit.layer, keep=remote is not None and remote.is_active)
        return result

    @contextmanager
    def weights_as_they_are(self) -> Iterator[None]:
        """Inside, units are computed with whatever lies in their slots, for timing only."""
        self._uses_pool = False
        try:
            yield
        finally:
            self._uses_pool = True

"""How one pooled unit is computed in a forward pass: with weights that are here, or by its owners.

In a CaS step a block that happens to lie in a slot, because it was prefetched for the next WaS
step, is computed here and stays there: what was prefetched is used, and the slots stay as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sidp_sgl.weightpool.cas.requester import Requester
from sidp_sgl.weightpool.cas.unit import PooledUnit
from sidp_sgl.weightpool.pool import WeightPool

Payload = Sequence[torch.Tensor]
# A unit and its payload to its result's rows, [num_rows, result.width].
RemoteCompute = Callable[[PooledUnit, Payload], torch.Tensor]


class UnitExecution:
    """`requester` is None where every step is a WaS step."""

    def __init__(self, pool: WeightPool, requester: Requester | None = None) -> None:
        self._pool = pool
        self._uses_pool = True
        self._captured_call: RemoteCompute | None = None
        self.requester = requester

    @property
    def staging_bytes(self) -> int:
        """What calls take of this rank's device, in bytes."""
        return self.requester.staging.num_bytes if self.requester is not None else 0

    def run(self, unit: PooledUnit, *args: Any, **kwargs: Any) -> Any:
        """What the unit's own forward would return."""
        if not self._uses_pool:
            return unit.forward(*args, **kwargs)
        if self._captured_call is not None and not self._pool.owns(unit.block):
            return unit.finish(self._captured_call(unit, unit.payload_of(*args, **kwargs)))
        if self._is_called(unit):
            result = self._call(unit, unit.payload_of(*args, **kwargs))
            if result is not None:
                return unit.finish(result)
        self._pool.enter(unit.block)
        result = unit.forward(*args, **kwargs)
        self._leave(unit)
        return result

    def compute_into(self, result: torch.Tensor, unit: PooledUnit, payload: Payload) -> None:
        """A unit's result [num_rows, result.width] between two parts of a captured CaS step; rows
        beyond those of the step only fill the graph's batch, and become zero."""
        assert self.requester is not None
        num_rows = min(self.requester.step_rows, len(result))
        if num_rows < len(result):
            result[num_rows:].zero_()
        payload = [rows[:num_rows] for rows in payload]
        if self._is_called(unit) and self._call(unit, payload, result[:num_rows]) is not None:
            return
        self._pool.enter(unit.block)
        result[:num_rows].copy_(unit.partial(*payload))
        self._leave(unit)

    def _is_called(self, unit: PooledUnit) -> bool:
        requester = self.requester
        return requester is not None and requester.is_active and not self._pool.holds(unit.block)

    def _call(
        self, unit: PooledUnit, payload: Payload, out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The result where the unit's owners have computed it, in `out` where given."""
        assert self.requester is not None
        return self.requester.call(self._pool.owners(unit.block), unit, payload, out)

    def _leave(self, unit: PooledUnit) -> None:
        if unit.is_last:
            keep = self.requester is not None and self.requester.is_active
            self._pool.leave(unit.block, keep=keep)

    @contextmanager
    def capturing_calls(self, call: RemoteCompute) -> Iterator[None]:
        """Inside, `call` stands for the units of other ranks' blocks: a CaS step is captured."""
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

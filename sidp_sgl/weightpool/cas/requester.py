"""The requester's side of CaS: sends a unit's input rows to its owner and waits for the result.

Every wait is bounded. After silence the rest of the step streams weights, and no call is made
until the late answer has come: until then its result may still be written.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sidp_sgl.weightpool.cas.calls import Calls, Outcome
from sidp_sgl.weightpool.cas.staging import Staging
from sidp_sgl.weightpool.cas.unit import PooledUnit, RowsViews

PATIENCE_SECONDS = 1.0  # an owner answers within milliseconds unless it was stopped


@dataclass
class RemoteCounters:
    """What was sent to owners and what it cost."""

    calls: int = 0
    rows_sent: int = 0
    fallbacks: int = 0  # units that were computed here after all
    replays: int = 0  # steps whose parts between the calls were CUDA graphs
    wait_seconds: float = 0.0


class RemoteUnits:
    """One rank's calls. `staging` is alike on all ranks."""

    def __init__(self, calls: Calls, staging: Staging, patience: float = PATIENCE_SECONDS) -> None:
        self.counters = RemoteCounters()
        self.staging = staging
        self._calls = calls
        self._inboxes: dict[int, RowsViews] = {}
        self._results = RowsViews(calls.results)
        self._patience = patience
        self._offsets: Mapping[int, int] | None = None  # owner → first leased row, in a CaS step
        self.step_rows = 0  # of the latest CaS step
        self._unanswered: int | None = None  # owner whose answer is still to come

    @property
    def is_active(self) -> bool:
        """Whether units of other ranks' layers are called in this step."""
        return self._offsets is not None

    def is_available(self) -> bool:
        """False while the answer to a call that was given up is still to come."""
        if self._unanswered is not None:
            if self._calls.wait(self._unanswered, 0.0) is Outcome.SILENT:
                return False
            self._unanswered = None
        return True

    def begin_step(self, offsets: Mapping[int, int], rows: int) -> None:
        """This step's calls use `rows` rows from `offsets` (owner → row) of the inboxes."""
        assert self._unanswered is None
        self._offsets, self.step_rows = offsets, rows

    def end_step(self) -> None:
        self._offsets = None

    def call(
        self, owner: int, unit: PooledUnit, rows: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """[num_rows, out_width] as `unit` computes them at its owner, in `out` where given; None
        where the unit has to be computed here, as all further ones of this step."""
        assert self._offsets is not None
        num_rows = rows.shape[0]
        if num_rows > self.step_rows or rows.dtype != unit.dtype:
            self._fall_back()
            return None
        started = time.perf_counter()
        offset = self._offsets[owner] * self.staging.row_bytes
        inbox = self._inboxes.get(owner)
        if inbox is None:
            inbox = self._inboxes[owner] = RowsViews(self._calls.inbox_of(owner))
        inbox.view(offset, num_rows, unit.in_width, unit.dtype).copy_(rows)
        self._calls.send(owner, unit.number, offset, num_rows)
        outcome = self._calls.wait(owner, self._patience)
        counters = self.counters
        counters.wait_seconds += time.perf_counter() - started
        counters.calls += 1
        counters.rows_sent += num_rows
        if outcome is Outcome.SILENT:
            self._unanswered = owner
        if outcome is not Outcome.DONE:
            self._fall_back()
            return None
        result = self._results.view(0, num_rows, unit.out_width, unit.dtype)
        return result.clone() if out is None else out.copy_(result)

    def _fall_back(self) -> None:
        self.counters.fallbacks += 1
        self._offsets = None

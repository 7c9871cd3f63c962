"""The requester's side of CaS: sends a unit's payload to its owners and waits for the results.

Every wait is bounded. After silence the rest of the step streams weights, and no call is made
until the late answer has come: until then its result may still be written.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sidp_sgl.weightpool.cas.mailbox import Mailbox, Outcome
from sidp_sgl.weightpool.cas.staging import Staging
from sidp_sgl.weightpool.cas.unit import PooledUnit, RowsViews

PATIENCE_SECONDS = 1.0  # an owner answers within milliseconds unless it was stopped


@dataclass
class RequesterCounters:
    """What was sent to owners and what it cost."""

    calls: int = 0
    rows_sent: int = 0
    fallbacks: int = 0  # units that were computed here after all
    replays: int = 0  # steps whose parts between the calls were CUDA graphs
    wait_seconds: float = 0.0


class Requester:
    """One rank's calls. `staging` is alike on all ranks."""

    def __init__(
        self, mailbox: Mailbox, staging: Staging, patience: float = PATIENCE_SECONDS
    ) -> None:
        self.counters = RequesterCounters()
        self.staging = staging
        self._mailbox = mailbox
        self._inboxes: dict[int, RowsViews] = {}
        self._results = RowsViews(mailbox.results)
        self._patience = patience
        self.is_in_step = False  # a CaS step, also where its units are computed here after all
        # Whether units of other ranks' blocks are called from here on in this step.
        self.is_active = False
        self.step_rows = 0  # of the latest CaS step
        self._unanswered: set[int] = set()  # owners whose answers are still to come

    def is_available(self) -> bool:
        """False while the answer to a call that was given up is still to come."""
        for owner in list(self._unanswered):
            if self._mailbox.wait(owner, 0.0) is not Outcome.SILENT:
                self._unanswered.remove(owner)
        return not self._unanswered

    def begin_step(self, rows: int) -> None:
        """A CaS step of `rows` rows, which all owners lease. It may be one for other TP ranks while
        an answer to this one is still to come: then its units are computed here."""
        self.is_in_step = self.is_active = True
        self.step_rows = rows
        if not self.is_available():
            self._fall_back()

    def end_step(self) -> None:
        self.is_in_step = self.is_active = False

    def call(
        self,
        owners: Sequence[int],
        unit: PooledUnit,
        payload: Sequence[torch.Tensor],
        out: torch.Tensor | None = None,
        patience: float | None = None,
    ) -> torch.Tensor | None:
        """The sum of what `owners` compute of `unit`, [num_rows, result.width], in `out` where
        given; None where the unit has to be computed here, as all further ones of this step.
        `patience`: seconds, in place of the usual ones."""
        patience = self._patience if patience is None else patience
        num_rows = len(payload[0])
        fits = all(row.fits(rows) for row, rows in zip(unit.payload, payload, strict=True))
        if num_rows > self.step_rows or not fits:
            self._fall_back()
            return None
        started = time.perf_counter()
        for index, owner in enumerate(owners):
            self._send(owner, unit, payload, index * self.staging.result_bytes)
        outcomes = []
        for owner in owners:
            # Whoever follows a silent one had as long as that.
            seconds = 0.0 if Outcome.SILENT in outcomes else patience
            outcomes.append(self._mailbox.wait(owner, seconds))
        counters = self.counters
        counters.wait_seconds += time.perf_counter() - started
        counters.calls += 1
        counters.rows_sent += num_rows * len(owners)
        if any(outcome is not Outcome.DONE for outcome in outcomes):
            answers = zip(owners, outcomes, strict=True)
            self._unanswered = {owner for owner, outcome in answers if outcome is Outcome.SILENT}
            self._fall_back()
            return None
        result = self._result(unit, num_rows, 0)
        result = result.clone() if out is None else out.copy_(result)
        for index in range(1, len(owners)):  # in a fixed order: the sum depends on it
            result += self._result(unit, num_rows, index)
        return result

    def _send(
        self, owner: int, unit: PooledUnit, payload: Sequence[torch.Tensor], result_offset: int
    ) -> None:
        inbox = self._inboxes.get(owner)
        if inbox is None:
            inbox = self._inboxes[owner] = RowsViews(self._mailbox.inbox_of(owner))
        offset = self.staging.offset(owner, self._mailbox.rank)
        num_rows = len(payload[0])
        for target, rows in zip(inbox.payload(unit, offset, num_rows), payload, strict=True):
            target.copy_(rows)
        self._mailbox.send(owner, unit.number, offset, num_rows, result_offset)

    def _result(self, unit: PooledUnit, num_rows: int, index: int) -> torch.Tensor:
        return self._results.view(index * self.staging.result_bytes, num_rows, unit.result)

    def _fall_back(self) -> None:
        self.counters.fallbacks += 1
        self.is_active = False

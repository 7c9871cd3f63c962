"""The owner's side of CaS: computes what other ranks send, whatever its scheduler does.

A thread of its own sleeps at the doorbell. Calls for the same unit that are there together are
computed in one GEMM; nobody waits for ranks that send nothing.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sidp_sgl.weightpool.cas.mailbox import Call, Mailbox, Outcome
from sidp_sgl.weightpool.cas.unit import PooledUnit, RowsViews

logger = logging.getLogger(__name__)
_POLL_SECONDS = 1.0


@dataclass
class ServiceCounters:
    """What was computed for others; written by the service's thread."""

    calls: int = 0
    rows_served: int = 0
    gemms: int = 0  # passes through a unit
    fused_gemms: int = 0  # those with rows of more than one rank
    failed: int = 0  # calls that could not be computed
    busy_seconds: float = 0.0


class Service:
    """Serves `units` (number → unit; those of owned blocks). `on_busy(start, end)`, in monotonic
    seconds, is told how long each round of service took; `on_failure`, by its thread, that it can't
    even answer any more and ends."""

    def __init__(
        self,
        mailbox: Mailbox,
        units: Mapping[int, PooledUnit],
        on_busy: Callable[[float, float], None] = lambda start, end: None,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        self.counters = ServiceCounters()
        self._mailbox = mailbox
        self._inbox = RowsViews(mailbox.inbox)
        self._results: dict[int, RowsViews] = {}
        self._units = units
        self._on_busy = on_busy
        self._on_failure = on_failure
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="sidp-service", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopped = True
        self._mailbox.wake()
        if self._thread.is_alive():
            self._thread.join(2 * _POLL_SECONDS)

    def _run(self) -> None:
        try:
            self._serve_calls()
        except Exception as error:  # requesters would meet silence for ever
            if self._on_failure is None:
                raise
            self._on_failure(error)

    def _serve_calls(self) -> None:
        with torch.inference_mode(), self._mailbox.serving():
            while not self._stopped:
                calls = self._mailbox.receive(_POLL_SECONDS)
                if calls:
                    started = time.monotonic()
                    self.serve(calls)
                    ended = time.monotonic()
                    self.counters.busy_seconds += ended - started
                    self._on_busy(started, ended)

    def serve(self, calls: list[Call]) -> None:
        """Compute and answer `calls`; one that can't be computed is answered as failed. Raises what
        keeps even that from being said, as a device that has failed."""
        by_unit: dict[int, list[Call]] = defaultdict(list)
        for call in calls:
            by_unit[call.unit].append(call)
        for number, together in by_unit.items():
            try:
                self._compute(self._units[number], together)
            except Exception:
                logger.exception("rows for unit %d could not be computed", number)
                self.counters.failed += len(together)
                for call in together:
                    self._mailbox.answer(call, Outcome.FAILED)

    def _results_of(self, requester: int) -> RowsViews:
        found = self._results.get(requester)
        if found is None:
            found = self._results[requester] = RowsViews(self._mailbox.results_of(requester))
        return found

    def _compute(self, unit: PooledUnit, calls: list[Call]) -> None:
        payloads = [self._inbox.payload(unit, call.offset, call.rows) for call in calls]
        targets = [
            self._results_of(call.requester).view(call.result_offset, call.rows, unit.result)
            for call in calls
        ]
        if len(calls) == 1:
            outputs = [unit.partial(*payloads[0])]
        else:
            merged = [torch.cat(parts) for parts in zip(*payloads, strict=True)]
            outputs = list(unit.partial(*merged).split([call.rows for call in calls]))
        counters = self.counters
        counters.calls += len(calls)
        counters.gemms += 1
        counters.fused_gemms += len(calls) > 1
        counters.rows_served += sum(call.rows for call in calls)
        for call, target, output in zip(calls, targets, outputs, strict=True):
            target.copy_(output)
            self._mailbox.answer(call, Outcome.DONE)

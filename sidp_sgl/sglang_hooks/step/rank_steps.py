"""Every step of a rank as SiDP sees it: its mode before, its cost after, its state to others.

TP rank 0 decides a step's mode (`RankSteps`), the others follow (`FollowerSteps`).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from sidp_sgl.scheduler.control_plane import ControlPlane
from sidp_sgl.scheduler.messages import RankState
from sidp_sgl.scheduler.modes.policy import CAS, WAS
from sidp_sgl.sglang_hooks.step.calibration import calibrate
from sidp_sgl.weightpool.cas.requester import Requester
from sidp_sgl.weightpool.execution import UnitExecution
from sidp_sgl.weightpool.pool import WeightPool


class _Begun(NamedTuple):
    """A decode step that was begun; times in seconds."""

    at: float
    mode: str
    batch_size: int
    stall: float


class RankSteps:
    """`received()`: requests that the DP controller has sent so far."""

    def __init__(
        self,
        control: ControlPlane,
        pool: WeightPool,
        execution: UnitExecution,
        received: Callable[[], int] = lambda: 0,
    ) -> None:
        self.share: Callable[[str], None] = lambda mode: None  # with the other TP ranks
        self._received = received
        self._control = control
        self._modes = control.modes
        self._pool = pool
        self._execution = execution
        self._last: _Begun | None = None

    def calibrate(self, scheduler: Any) -> None:
        """Measure what the mode policy begins with, where there is a choice of modes."""
        if self._execution.requester is not None:
            self._modes.times = calibrate(scheduler, self._pool, self._execution)

    def run_batch(self, original: Any, scheduler: Any, batch: Any, *args: Any, **kw: Any) -> Any:
        now = time.perf_counter()
        is_decode, rows = batch.forward_mode.is_decode(), _rows(batch)
        self._observe(now, is_next=is_decode and not scheduler._sched_idled)
        remote = self._execution.requester
        can_call = remote is not None and remote.is_available()
        begin = self._modes.begin_decode if is_decode else self._modes.begin_prefill
        is_local = self._pool.is_local
        mode = begin(rows, can_call=can_call, is_local=is_local) if rows else WAS
        if remote is not None and rows:
            self.share(mode)
        # Steps that find blocks here say nothing of those that don't.
        teaches = is_decode and not self._pool.prefetcher.residents
        self._last = _Begun(now, mode, rows, self._stall_seconds()) if teaches else None
        with _step(remote, mode, rows):
            result = original(scheduler, batch, *args, **kw)
        if is_decode:
            can_call = remote is not None and remote.is_available()  # not after a silence
            self._modes.end_decode(rows, mode, can_call=can_call)
        else:
            self._modes.end_prefill(mode)
        return result

    def _stall_seconds(self) -> float:
        return self._pool.prefetcher.counters.stall_seconds

    def _observe(self, now: float, *, is_next: bool) -> None:
        """A decode step lasts until the next one begins, if that follows at once."""
        last = self._last
        if last is None or not is_next:
            return
        seconds = now - last.at
        stall = self._stall_seconds() - last.stall
        self._modes.observe(last.mode, last.batch_size, seconds, stall)

    def publish(self, scheduler: Any) -> None:
        """Tell the DP controller how this rank is."""
        running = len(scheduler.running_batch.reqs)
        stats = scheduler.pool_stats_observer.get_pool_stats()
        state = RankState(
            rank=self._pool.rank,
            running_batch_size=running + being_prefilled(scheduler),
            waiting_requests=len(scheduler.waiting_queue),
            received=self._received(),
            max_running_requests=int(scheduler.max_running_requests),
            kv_capacity_tokens=int(scheduler.max_total_num_tokens),
            kv_headroom_tokens=int(stats.full_available_size + stats.full_evictable_size),
        )
        self._control.own_batch_size = running
        if not running:
            self._modes.leases.release()
        self._control.publish(state)


class FollowerSteps:
    """`receive()`: the mode of a step, which TP rank 0 shares."""

    def __init__(
        self, pool: WeightPool, execution: UnitExecution, receive: Callable[[], str]
    ) -> None:
        self._pool = pool
        self._execution = execution
        self._receive = receive

    def calibrate(self, scheduler: Any) -> None:
        """As TP rank 0, whose dummy steps sum over all TP ranks; its times count."""
        if self._execution.requester is not None:
            calibrate(scheduler, self._pool, self._execution)

    def run_batch(self, original: Any, scheduler: Any, batch: Any, *args: Any, **kw: Any) -> Any:
        remote, rows = self._execution.requester, _rows(batch)
        mode = self._receive() if remote is not None and rows else WAS
        with _step(remote, mode, rows):
            return original(scheduler, batch, *args, **kw)

    def publish(self, scheduler: Any) -> None:
        """TP rank 0 does."""


def _rows(batch: Any) -> int:
    """Of the forward pass: the requests of a decode step, the tokens of a prefill; 0 of others."""
    if batch.forward_mode.is_decode():
        return batch.batch_size()
    return batch.extend_num_tokens if batch.forward_mode.is_extend() else 0


@contextmanager
def _step(requester: Requester | None, mode: str, rows: int) -> Iterator[None]:
    """Around a forward pass."""
    if requester is None or mode != CAS:
        yield
        return
    requester.begin_step(rows)
    try:
        yield
    finally:
        requester.end_step()


def being_prefilled(scheduler: Any) -> int:
    """Requests that have left the queue and do not decode yet."""
    last = scheduler.last_batch
    return len(last.reqs) if last is not None and last.forward_mode.is_extend() else 0

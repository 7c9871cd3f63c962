"""Every step of a rank as SiDP sees it: its mode before, its cost after, its state to others.

TP rank 0 decides a step's mode (`RankSteps`), the others follow (`FollowerSteps`).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from sidp_sgl.scheduler.control_plane import ControlPlane
from sidp_sgl.scheduler.messages import RankState
from sidp_sgl.scheduler.modes.policy import WAS
from sidp_sgl.sglang_hooks.step.calibration import calibrate
from sidp_sgl.weightpool.cas.requester import Requester
from sidp_sgl.weightpool.cas.staging import ROWS_PER_RANK
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
            self._modes.times = calibrate(scheduler, self._pool, self._execution, ROWS_PER_RANK)

    def run_batch(self, original: Any, scheduler: Any, batch: Any, *args: Any, **kw: Any) -> Any:
        now = time.perf_counter()
        is_decode = batch.forward_mode.is_decode()
        self._observe(now, is_next=is_decode and not scheduler._sched_idled)
        if not is_decode:
            self._last = None
            self._modes.end_prefill()
            return original(scheduler, batch, *args, **kw)
        batch_size, remote = batch.batch_size(), self._execution.requester
        can_call = remote is not None and remote.is_available()
        mode = self._modes.begin_decode(batch_size, can_call=can_call)
        if remote is not None:
            self.share(mode)
        self._last = _Begun(now, mode, batch_size, self._stall_seconds())
        with _decode_step(remote, mode, batch_size):
            result = original(scheduler, batch, *args, **kw)
        can_call = remote is not None and remote.is_available()  # not after a silence
        self._modes.end_decode(batch_size, mode, can_call=can_call)
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
            running_batch_size=running + _being_prefilled(scheduler),
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
    """`receive()`: the mode of a decode step, which TP rank 0 shares."""

    def __init__(
        self, pool: WeightPool, execution: UnitExecution, receive: Callable[[], str]
    ) -> None:
        self._pool = pool
        self._execution = execution
        self._receive = receive

    def calibrate(self, scheduler: Any) -> None:
        """As TP rank 0, whose dummy steps sum over all TP ranks; its times count."""
        if self._execution.requester is not None:
            calibrate(scheduler, self._pool, self._execution, ROWS_PER_RANK)

    def run_batch(self, original: Any, scheduler: Any, batch: Any, *args: Any, **kw: Any) -> Any:
        remote, mode = self._execution.requester, WAS
        if remote is not None and batch.forward_mode.is_decode():
            mode = self._receive()
        with _decode_step(remote, mode, batch.batch_size()):
            return original(scheduler, batch, *args, **kw)

    def publish(self, scheduler: Any) -> None:
        """TP rank 0 does."""


@contextmanager
def _decode_step(requester: Requester | None, mode: str, batch_size: int) -> Iterator[None]:
    """Around a forward pass."""
    if requester is None or mode == WAS:
        yield
        return
    requester.begin_step(batch_size)
    try:
        yield
    finally:
        requester.end_step()


def _being_prefilled(scheduler: Any) -> int:
    """Requests that have left the queue and do not decode yet."""
    last = scheduler.last_batch
    return len(last.reqs) if last is not None and last.forward_mode.is_extend() else 0

"""What SiDP does at each place of SGLang's `Scheduler`, in the order in which it happens."""

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.errors import SidpError
from sidp_sgl.sglang_hooks.dispatch.waiting import WaitingRequests
from sidp_sgl.sglang_hooks.failures.reports import RankReports
from sidp_sgl.sglang_hooks.required import Hook
from sidp_sgl.sglang_hooks.residency.lender import KvLender
from sidp_sgl.sglang_hooks.status.metrics import Metrics
from sidp_sgl.sglang_hooks.step.rank_steps import FollowerSteps, RankSteps
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.self_check.check import SelfCheck

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


class SchedulerHooks:
    """`say`: what there is to say of the machine when the rank has started; `metrics`: None without
    --enable-metrics; `lender`: None without residency."""

    def __init__(
        self,
        reports: RankReports,
        pool: WeightPool,
        waiting: WaitingRequests,
        steps: RankSteps | FollowerSteps,
        self_check: SelfCheck,
        say: Callable[[], None],
        metrics: Metrics | None,
        lender: KvLender | None,
    ) -> None:
        self.scheduler: Any = None  # SGLang's, once it is made
        self._reports = reports
        self._pool = pool
        self._waiting = waiting
        self._steps = steps
        self._self_check = self_check
        self._say = say
        self._metrics = metrics
        self._lender = lender

    def hooks(self) -> list[Hook]:
        return [
            Hook(f"{_SCHEDULER}.__init__", self._init, HookType.AROUND),
            Hook(f"{_SCHEDULER}.run_event_loop", self._run_event_loop, HookType.AROUND),
            Hook(f"{_SCHEDULER}._poll_timeout_aborts", self._waiting.pick, HookType.AFTER),
            Hook(f"{_SCHEDULER}.ingest_requests", self._after_ingest, HookType.AFTER),
            Hook(f"{_SCHEDULER}.run_batch", self._run_batch, HookType.AROUND),
        ]

    def _init(self, original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        with self._reports.errors():
            original(scheduler, *args, **kwargs)
            if not self._pool.is_started:
                raise SidpError("--sidp: SGLang has loaded the model past the weight pool")
            self.scheduler = scheduler
            self._waiting.handle_give_back(scheduler)
            self._self_check.check_blocks()
            self._steps.calibrate(scheduler)
            self._self_check.check_calls()
            self._say()
            self._reports.pooled()

    def _run_event_loop(self, original: Any, *args: Any, **kwargs: Any) -> None:
        with self._reports.errors():
            original(*args, **kwargs)

    def _run_batch(self, original: Any, scheduler: Any, batch: Any, *args: Any, **kw: Any) -> Any:
        self._self_check.before_step()
        if self._lender is not None and batch.forward_mode.is_extend():
            self._lender.saw_prefill(batch)
        return self._steps.run_batch(original, scheduler, batch, *args, **kw)

    def _after_ingest(self, messages: list[Any], scheduler: Any, *_: Any, **__: Any) -> list[Any]:
        """Once per iteration, also where the rank is idle: an idle owner serves rows."""
        self._waiting.count(messages, scheduler)
        self._steps.publish(scheduler)
        if self._lender is not None:
            self._lender.tick(scheduler)
        if self._metrics is not None:
            self._metrics.publish_each_second(scheduler.metrics_collector.labels)
        return messages

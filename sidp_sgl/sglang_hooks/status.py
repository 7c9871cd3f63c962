"""The `sidp` dictionary of every rank in /server_info, and its short part of the decode log line.

Room: sglang_hooks.
"""

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks.required import Hook


class StatusHooks:
    """`pool_status()` gives the pool's part; the scheduler's part is read here."""

    def __init__(self, pool_status: Callable[[], dict[str, Any]]) -> None:
        self._pool_status = pool_status
        self._iterations = 0
        self._logged_stall = 0.0
        self._logged_bytes = 0

    def hooks(self) -> list[Hook]:
        components = "sglang.srt.managers.scheduler_components"
        return [
            Hook(
                f"{components}.internal_state.SchedulerInternalStateController.get_internal_state",
                self._add_status,
                HookType.AFTER,
            ),
            Hook(
                f"{components}.pool_stats_observer.PoolStats.get_decode_usage_msg_parts",
                self._add_log_part,
                HookType.AFTER,
            ),
            Hook(
                "sglang.srt.managers.scheduler.Scheduler.run_batch",
                self._count_iteration,
                HookType.BEFORE,
            ),
        ]

    def _count_iteration(self, *_: Any, **__: Any) -> None:
        self._iterations += 1

    def _add_status(self, output: Any, controller: Any, *_: Any) -> Any:
        scheduler = controller.scheduler
        stats = scheduler.pool_stats_observer.get_pool_stats()
        output.internal_state["sidp"] = {
            **self._pool_status(),
            "kv_capacity_tokens": int(scheduler.max_total_num_tokens),
            "kv_headroom_tokens": int(stats.full_available_size + stats.full_evictable_size),
            "running_batch_size": len(scheduler.running_batch.reqs),
            "waiting_requests": len(scheduler.waiting_queue),
            "iterations": {"was": self._iterations, "cas": 0},
        }
        return output

    def _add_log_part(self, parts: list[str], *_: Any) -> list[str]:
        was = self._pool_status()["was"]
        fetched, stalled = was["bytes"], was["stall_seconds"]
        megabytes = (fetched - self._logged_bytes) / 1e6
        milliseconds = (stalled - self._logged_stall) * 1e3
        self._logged_bytes, self._logged_stall = fetched, stalled
        return [*parts, f"sidp: was, fetched {megabytes:.1f} MB, stalled {milliseconds:.1f} ms"]

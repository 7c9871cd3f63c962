"""The `sidp` dictionary of every rank in /server_info, and its short part of the decode log line.

Room: sglang_hooks.
"""

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks.required import Hook


class StatusHooks:
    """`rank_status()` gives the pool's and the modes' part; the scheduler's part is read here."""

    def __init__(self, rank_status: Callable[[], dict[str, Any]]) -> None:
        self._rank_status = rank_status
        self._logged: dict[str, float] = {}

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
        ]

    def _add_status(self, output: Any, controller: Any, *_: Any) -> Any:
        output.internal_state["sidp"] = self.status_of(controller.scheduler)
        return output

    def status_of(self, scheduler: Any) -> dict[str, Any]:
        """The whole `sidp` dictionary of a rank."""
        stats = scheduler.pool_stats_observer.get_pool_stats()
        return {
            **self._rank_status(),
            "kv_capacity_tokens": int(scheduler.max_total_num_tokens),
            "kv_headroom_tokens": int(stats.full_available_size + stats.full_evictable_size),
            "running_batch_size": len(scheduler.running_batch.reqs),
            "waiting_requests": len(scheduler.waiting_queue),
        }

    def _add_log_part(self, parts: list[str], *_: Any) -> list[str]:
        status = self._rank_status()
        was, cas, steps = status["was"], status["cas"], status["iterations"]
        text = (
            f"sidp: {status['mode']}, fetched {self._since('MB', was['bytes'] / 1e6):.1f} MB, "
            f"stalled {self._since('stall', was['stall_seconds'] * 1e3):.1f} ms"
        )
        if cas_steps := self._since("steps", steps["cas"]):
            text += (
                f", {cas_steps:.0f} CaS steps, sent {self._since('sent', cas['rows_sent']):.0f} "
                f"rows, waited {self._since('wait', cas['wait_seconds'] * 1e3):.1f} ms"
            )
        if served := self._since("served", cas.get("rows_served", 0)):
            text += f", served {served:.0f} rows"
        return [*parts, text]

    def _since(self, name: str, value: float) -> float:
        """How far a counter has come since the last line."""
        before = self._logged.get(name, 0.0)
        self._logged[name] = value
        return value - before

"""A rank's status in /server_info, and its short part of the decode log line."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.scheduler.status import LogLine, Status
from sidp_sgl.sglang_hooks.required import Hook

_COMPONENTS = "sglang.srt.managers.scheduler_components"
_GET_INTERNAL_STATE = (
    f"{_COMPONENTS}.internal_state.SchedulerInternalStateController.get_internal_state"
)


class ServerInfo:
    """`members()`: figures of the DP rank's processes, which all take part."""

    def __init__(
        self, status: Callable[[], Status], members: Callable[[], list[dict[str, Any]]]
    ) -> None:
        self._status = status
        self._members = members
        self._log_line = LogLine()

    def hooks(self) -> list[Hook]:
        return [
            Hook(_GET_INTERNAL_STATE, self._add_status, HookType.AFTER),
            Hook(
                f"{_COMPONENTS}.pool_stats_observer.PoolStats.get_decode_usage_msg_parts",
                self._add_log_part,
                HookType.AFTER,
            ),
        ]

    def _add_status(self, output: Any, *_: Any) -> Any:
        output.internal_state["sidp"] = {**asdict(self._status()), "members": self._members()}
        return output

    def _add_log_part(self, parts: list[str], *_: Any) -> list[str]:
        return [*parts, self._log_line.text(asdict(self._status()))]


def follower_hook(members: Callable[[], Any]) -> Hook:
    """On TP ranks above 0, whose answer nobody reads: they take part."""

    def gather(output: Any, *_: Any) -> Any:
        members()
        return output

    return Hook(_GET_INTERNAL_STATE, gather, HookType.AFTER)

"""What SGLang's `set_internal_state` may change of a running rank: the batch threshold."""

from collections.abc import Callable
from typing import Any

from sglang.srt.managers.scheduler_components.internal_state import UpdateRejected, _UpdateHandler
from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.config import SidpConfig
from sidp_sgl.sglang_hooks.required import Hook

FIELD = "sidp_batch_threshold"
MEASURED = 0  # SGLang takes numbers only: stands for "auto"


class UpdateHooks:
    """As SGLang does it, a value that can't be is logged, and answered with `updated: false`.
    All TP ranks are told; `set_threshold` is that of TP rank 0."""

    def __init__(
        self, config: SidpConfig, set_threshold: Callable[[int | None], None] = lambda _: None
    ) -> None:
        self._mode = config.sidp_mode
        self._set_threshold = set_threshold

    def hooks(self) -> list[Hook]:
        return [
            Hook(
                "sglang.srt.managers.scheduler_components.internal_state."
                "SchedulerInternalStateController._update_handlers",
                self._add_handler,
                HookType.AFTER,
            )
        ]

    def _add_handler(self, handlers: dict[str, Any], _: Any) -> dict[str, Any]:
        return {**handlers, FIELD: _UpdateHandler(self._validate, self._apply)}

    def _validate(self, field: str, value: Any) -> None:
        if self._mode != "auto":
            raise UpdateRejected(
                f"{field} has no effect with --sidp-mode {self._mode}: restart with auto"
            )
        if not (value >= 0 and float(value).is_integer()):
            raise UpdateRejected(
                f"{field} {value} is not a batch size: use 1 or more, or 0 to measure it"
            )

    def _apply(self, _: str, value: Any) -> None:
        self._set_threshold(None if value == MEASURED else int(value))

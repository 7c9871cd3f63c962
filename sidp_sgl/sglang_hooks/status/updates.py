"""What SGLang's `set_internal_state` may change of a running rank: batch threshold, residency."""

from collections.abc import Callable
from typing import Any

from sglang.srt.managers.scheduler_components.internal_state import UpdateRejected, _UpdateHandler
from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.config import SidpConfig
from sidp_sgl.sglang_hooks.required import Hook

THRESHOLD, RESIDENCY = "sidp_batch_threshold", "sidp_residency"
MEASURED = 0  # SGLang takes numbers only: stands for "auto"


class UpdateHooks:
    """As SGLang does it, a value that can't be is logged, and answered with `updated: false`.
    All TP ranks are told; `set_threshold` is that of TP rank 0. `turn_residency`: None where
    blocks can't stay."""

    def __init__(
        self,
        config: SidpConfig,
        set_threshold: Callable[[int | None], None],
        turn_residency: Callable[[bool], None] | None,
    ) -> None:
        self._mode = config.sidp_mode
        self._set_threshold = set_threshold
        self._turn_residency = turn_residency

    def hooks(self) -> list[Hook]:
        return [
            Hook(
                "sglang.srt.managers.scheduler_components.internal_state."
                "SchedulerInternalStateController._update_handlers",
                self._add_handlers,
                HookType.AFTER,
            )
        ]

    def _add_handlers(self, handlers: dict[str, Any], _: Any) -> dict[str, Any]:
        return {
            **handlers,
            THRESHOLD: _UpdateHandler(self._check_threshold, self._apply_threshold),
            RESIDENCY: _UpdateHandler(self._check_residency, self._apply_residency),
        }

    def _check_threshold(self, field: str, value: Any) -> None:
        if self._mode != "auto":
            raise UpdateRejected(
                f"{field} has no effect with --sidp-mode {self._mode}: restart with auto"
            )
        if not (value >= 0 and float(value).is_integer()):
            raise UpdateRejected(
                f"{field} {value} is not a batch size: use 1 or more, or 0 to measure it"
            )

    def _apply_threshold(self, _: str, value: Any) -> None:
        self._set_threshold(None if value == MEASURED else int(value))

    def _check_residency(self, field: str, value: Any) -> None:
        if self._turn_residency is None:
            raise UpdateRejected(
                f"{field} has no effect: blocks stay with --sidp-mode auto, --sidp-residency auto, "
                "on CPU ranks"
            )
        if value not in (0, 1):
            raise UpdateRejected(f"{field} {value} is not a switch: use 1 or 0")

    def _apply_residency(self, _: str, value: Any) -> None:
        assert self._turn_residency is not None
        self._turn_residency(bool(value))

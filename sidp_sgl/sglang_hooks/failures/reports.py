"""What an engine's other processes report to its main process: pools, errors, exits.

An error that the main process knows of needs no traceback in the log when it is SiDP's own; of any
other the traceback is logged first.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.errors import SidpError
from sidp_sgl.scheduler.lifecycle.liveness import Exited, Lifeline, Pooled, give_up, watch_process
from sidp_sgl.scheduler.state_receiver import StateReceiver
from sidp_sgl.sglang_hooks.required import Hook

logger = logging.getLogger(__name__)


def join(group: str) -> Lifeline:
    """Tie this process to the engine's main process; ends it where that has gone already."""
    try:
        return Lifeline(group)
    except OSError:
        os._exit(1)


class RankReports:
    """In a DP scheduler process."""

    def __init__(self, group: str, dp_rank: int) -> None:
        self._group = group
        self._dp_rank = dp_rank
        self._is_pooled: Callable[[], bool] = lambda: False
        self._lifeline = join(group)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """An error inside ends the process and is reported."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, SidpError):
                logger.exception("DP rank %d fails", self._dp_rank)
            give_up(self._group, self._dp_rank, error)

    def hooks(self, is_pooled: Callable[[], bool]) -> list[Hook]:
        """`is_pooled`: whether the rank's pool is active; asked once the scheduler is made."""
        self._is_pooled = is_pooled
        scheduler = "sglang.srt.managers.scheduler.Scheduler"
        return [
            Hook(f"{scheduler}.__init__", self._init, HookType.AROUND),
            Hook(f"{scheduler}.run_event_loop", self._run_event_loop, HookType.AROUND),
        ]

    def _init(self, original: Any, *args: Any, **kwargs: Any) -> None:
        with self.errors():
            original(*args, **kwargs)
            if not self._is_pooled():
                raise SidpError("--sidp: SGLang has loaded the model past the weight pool")
            self._lifeline.send(Pooled(self._dp_rank))

    def _run_event_loop(self, original: Any, *args: Any, **kwargs: Any) -> None:
        with self.errors():
            original(*args, **kwargs)


class _WatchedProcesses(list[BaseProcess]):
    """The controller's list of rank processes: each is watched from the moment it is listed."""

    def __init__(self, lifeline: Lifeline) -> None:
        super().__init__()
        self._lifeline = lifeline

    def append(self, process: BaseProcess) -> None:
        super().append(process)
        dp_rank = _launching.dp_rank
        watch_process(process, lambda pid, code: self._lifeline.send(Exited(dp_rank, pid, code)))


_launching = threading.local()  # the controller launches every rank in a thread of its own


class ControllerReports:
    """In the DP controller process, the parent of all ranks."""

    def __init__(self, group: str, *, keeps_states: bool) -> None:
        self._group = group
        self._lifeline = join(group)
        self._keeps_states = keeps_states

    def hooks(self) -> list[Hook]:
        controller = "sglang.srt.managers.data_parallel_controller.DataParallelController"
        return [
            Hook(f"{controller}.__init__", self._receive_states, HookType.BEFORE),
            Hook(f"{controller}.launch_dp_schedulers", self._launch_all, HookType.AROUND),
            Hook(f"{controller}.launch_tensor_parallel_group", self._launch, HookType.AROUND),
        ]

    def _receive_states(self, controller: Any, *_: Any, **__: Any) -> None:
        """Before the ranks are launched: they connect as soon as they run."""
        if self._keeps_states:
            controller.sidp_states = StateReceiver(self._group)

    def _launch_all(self, original: Any, controller: Any, *args: Any, **kwargs: Any) -> None:
        controller.scheduler_procs = _WatchedProcesses(self._lifeline)
        original(controller, *args, **kwargs)

    def _launch(
        self, original: Any, controller: Any, server_args: Any, port_args: Any, base_gpu_id: int,
        dp_rank: int, *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        _launching.dp_rank = dp_rank
        original(controller, server_args, port_args, base_gpu_id, dp_rank, *args, **kwargs)

"""WaS inside SGLang's decode CUDA graphs: a step's fetches are captured with it.

Room: sglang_hooks. Only decode's "full" graphs are known; `refusals.py` keeps the others away.
"""

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks.required import Hook
from sidp_sgl.weightpool.execution import UnitExecution
from sidp_sgl.weightpool.pool import WeightPool

_BACKEND = "sglang.srt.model_executor.runner_backend.full_cuda_graph_backend.FullCudaGraphBackend"
_RUNNER = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"


class GraphHooks:
    """In a rank's scheduler process, on GPUs."""

    def __init__(self, pool: WeightPool, execution: UnitExecution) -> None:
        self._pool = pool
        self._execution = execution

    def hooks(self) -> list[Hook]:
        return [
            Hook(f"{_BACKEND}.capture_one", self._capture_one, HookType.AROUND),
            Hook(f"{_BACKEND}.replay", self._replay, HookType.AROUND),
            Hook(f"{_RUNNER}.can_run_graph", self._can_run_graph, HookType.AROUND),
        ]

    def _capture_one(
        self, original: Any, backend: Any, shape_key: Any, forward: Callable, *args: Any, **kw: Any
    ) -> Any:
        """`forward` runs twice to warm up, and then once more to be captured."""

        def step() -> Any:
            with self._pool.step():
                return forward()

        return original(backend, shape_key, step, *args, **kw)

    def _replay(self, original: Any, backend: Any, *args: Any, **kwargs: Any) -> Any:
        self._pool.begin_replay()
        return original(backend, *args, **kwargs)

    def _can_run_graph(self, original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
        """A CaS step calls its owners from the host."""
        remote = self._execution.remote
        if remote is not None and remote.is_active:
            return False
        return original(runner, *args, **kwargs)

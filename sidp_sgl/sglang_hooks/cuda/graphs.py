"""SGLang's decode CUDA graphs with --sidp: one set of graphs per mode, chosen per step.

A WaS step's fetches are captured with it; a CaS step is captured in parts (`cas_graphs.py`).
Only decode's "full" graphs are known; `refusals.py` keeps the others away.
"""

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks.cuda.cas_graphs import CasGraphs
from sidp_sgl.sglang_hooks.required import Hook
from sidp_sgl.weightpool.execution import UnitExecution
from sidp_sgl.weightpool.pool import WeightPool

_BACKEND = "sglang.srt.model_executor.runner_backend.full_cuda_graph_backend.FullCudaGraphBackend"


class GraphHooks:
    """In a rank's scheduler process, on GPUs."""

    def __init__(self, pool: WeightPool, execution: UnitExecution) -> None:
        self._pool = pool
        self._execution = execution
        self._cas = CasGraphs(execution)

    def hooks(self) -> list[Hook]:
        return [
            Hook(f"{_BACKEND}.capture_one", self._capture_one, HookType.AROUND),
            Hook(f"{_BACKEND}.replay", self._replay, HookType.AROUND),
        ]

    def _capture_one(
        self, original: Any, backend: Any, shape_key: Any, forward: Callable, *args: Any, **kw: Any
    ) -> None:
        """`forward` runs twice to warm up, and then once more to be captured."""

        def step() -> Any:
            with self._pool.step():
                return forward()

        original(backend, shape_key, step, *args, **kw)
        self._cas.capture(backend, shape_key, forward)

    def _replay(self, original: Any, backend: Any, shape_key: Any, *args: Any, **kw: Any) -> Any:
        requester = self._execution.requester
        # As TP rank 0 has decided, also where this one computes by itself.
        if requester is not None and requester.is_in_step:
            return self._cas.replay(shape_key)
        self._pool.begin_replay()
        return original(backend, shape_key, *args, **kw)

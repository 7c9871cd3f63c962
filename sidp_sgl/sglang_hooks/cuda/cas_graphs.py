"""CaS steps in CUDA graphs: what lies between two calls is a graph, each call is the host's.

SGLang's breakable graphs split the step; the waits for owners stay those of an eager step, bounded,
and an owner that falls silent costs what it costs there.
"""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
    BreakableCUDAGraph,
    BreakableCUDAGraphCapture,
    eager_on_graph,
)
from sglang.srt.model_executor.runner_utils.pool import (
    graph_pool_capture_scope,
    graph_pool_replay_scope,
)

from sidp_sgl.weightpool.cas.unit import PooledUnit
from sidp_sgl.weightpool.execution import Payload, UnitExecution


class CasGraphs:
    """One graph set, beside the WaS steps' own."""

    def __init__(self, execution: UnitExecution) -> None:
        self._execution = execution
        self._graphs: dict[Any, BreakableCUDAGraph] = {}
        self._outputs: dict[Any, Any] = {}
        self._break = eager_on_graph(_compute, capture_stub=lambda *_: None)

    def capture(self, backend: Any, shape_key: Any, forward: Callable[[], Any]) -> None:
        """`forward` has been warmed up. `backend` is SGLang's for decode, in its capture session;
        sizes that a CaS step can't have are left out."""
        requester = self._execution.requester
        if requester is None:
            return
        most = requester.staging.rows_per_rank
        sizes = backend._cuda_graph_runner.capture_bs
        if max((size for size in sizes if size < shape_key.size), default=0) >= most:
            return
        graph = BreakableCUDAGraph()
        with (
            graph_pool_capture_scope(),
            BreakableCUDAGraphCapture(graph, pool=backend._pool, stream=backend._capture_stream),
            self._execution.capturing_calls(self._call),
        ):
            self._outputs[shape_key] = forward()
        self._graphs[shape_key] = graph

    def replay(self, shape_key: Any) -> Any:
        """What `forward` returned, computed anew."""
        assert self._execution.requester is not None
        self._execution.requester.counters.replays += 1
        with graph_pool_replay_scope():
            self._graphs[shape_key].replay()
        return self._outputs[shape_key]

    def _call(self, unit: PooledUnit, payload: Payload) -> torch.Tensor:
        # Of the graphs' memory.
        result = payload[0].new_empty(len(payload[0]), unit.result.width, dtype=unit.result.dtype)
        self._break(self._execution, unit, result, *payload)
        return result


def _compute(
    execution: UnitExecution, unit: PooledUnit, result: torch.Tensor, *payload: torch.Tensor
) -> None:
    execution.compute_into(result, unit, payload)

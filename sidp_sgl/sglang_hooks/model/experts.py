"""A layer's experts as one unit: rows travel with the ids and weights that the router gave them."""

from typing import Any

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopKOutputChecker

from sidp_sgl.weightpool.cas.unit import PooledUnit, RowType

_IDS, _WEIGHTS = torch.int32, torch.float32  # as SGLang's kernels take them


def pooled_experts(experts: FusedMoE, number: int, block: int, *, is_last: bool) -> PooledUnit:
    """The experts as the weight pool sees them. The owner does not route: what a rank sends is
    routed by that rank's own router, and its owner needs nothing of the mixture but the experts."""

    def payload_of(
        rows: torch.Tensor, topk_output: Any, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, ...]:
        if not TopKOutputChecker.format_is_standard(topk_output):
            topk_output = topk_output.to_standard()
        return rows, topk_output.topk_weights, topk_output.topk_ids.to(_IDS)

    def partial(rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        chosen = StandardTopKOutput(weights, ids, weights.new_empty(0))
        # Some kernels compute in place, or drop what they were given: a view of its own.
        dispatched = StandardDispatchOutput(rows[:], None, chosen)
        return experts.quant_method.apply(layer=experts, dispatch_output=dispatched).hidden_states[
            :, : experts.hidden_size
        ]

    def finish(rows: torch.Tensor) -> torch.Tensor:
        return tensor_model_parallel_all_reduce(rows) if reduces else rows

    reduces = experts.reduce_results and experts.moe_tp_size > 1
    return PooledUnit(
        number,
        block,
        is_last,
        payload=(
            RowType(experts.hidden_size, experts.params_dtype),
            RowType(experts.top_k, _WEIGHTS),
            RowType(experts.top_k, _IDS),
        ),
        result=RowType(experts.hidden_size, experts.params_dtype),
        forward=experts.forward,
        partial=partial,
        finish=finish,
        payload_of=payload_of,
    )

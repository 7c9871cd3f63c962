"""A layer's experts as a unit: what travels, what its owner computes, what the requester does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.topk import StandardTopKOutput
from torch import nn

from sidp_sgl.sglang_hooks.model import experts as experts_module
from sidp_sgl.sglang_hooks.model.experts import pooled_experts

HIDDEN, NUM_EXPERTS, TOP_K = 8, 4, 2


class Method:
    def apply(self, layer: Any, dispatch_output: Any) -> SimpleNamespace:
        rows, (weights, ids, _) = dispatch_output.hidden_states, dispatch_output.topk_output
        parts = torch.einsum("th,tkho->tko", rows, layer.w[ids.long()])
        result = torch.einsum("tko,tk->to", parts, weights)
        rows.zero_()  # as kernels that compute in place
        return SimpleNamespace(hidden_states=result)


class Experts(nn.Module):
    def __init__(self, reduce_results: bool = False) -> None:
        super().__init__()
        self.hidden_size, self.top_k, self.params_dtype = HIDDEN, TOP_K, torch.float32
        self.reduce_results, self.moe_tp_size = reduce_results, 2
        self.quant_method = Method()
        self.w = torch.randn(NUM_EXPERTS, HIDDEN, HIDDEN)

    def forward(self, rows: torch.Tensor, topk_output: Any) -> str:
        return "here"


def routed(num_rows: int) -> StandardTopKOutput:
    logits = torch.randn(num_rows, NUM_EXPERTS)
    weights, ids = torch.topk(logits.softmax(-1), TOP_K)
    return StandardTopKOutput(weights, ids, logits)


def test_rows_travel_with_ids_and_weights_and_come_back_computed() -> None:
    experts, rows, chosen = Experts(), torch.randn(3, HIDDEN), routed(3)
    unit = pooled_experts(experts, 5, 2, is_last=True)  # type: ignore[arg-type]
    payload = unit.payload_of(rows, chosen)
    assert all(row.fits(part) for row, part in zip(unit.payload, payload, strict=True))
    expected = torch.einsum("th,tkho->tko", rows, experts.w[chosen.topk_ids])
    expected = torch.einsum("tko,tk->to", expected, chosen.topk_weights)
    result = unit.partial(*[part.clone() for part in payload])
    assert unit.result.fits(result) and torch.equal(result, expected)
    assert unit.finish(result) is result
    assert (unit.number, unit.block, unit.is_last, unit.forward(rows, chosen)) == (
        5,
        2,
        True,
        "here",
    )


def test_another_form_of_routing_is_made_the_standard_one() -> None:
    unit = pooled_experts(Experts(), 0, 0, is_last=True)  # type: ignore[arg-type]
    chosen = routed(3)
    bypassed = SimpleNamespace(
        format=SimpleNamespace(is_standard=lambda: False), to_standard=lambda: chosen
    )
    _, weights, ids = unit.payload_of(torch.randn(3, HIDDEN), bypassed)
    assert torch.equal(weights, chosen.topk_weights) and torch.equal(ids, chosen.topk_ids)


@pytest.mark.parametrize("reduce_results", [True, False])
def test_what_tp_ranks_have_is_added_up_at_the_requester(
    reduce_results: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed = []
    monkeypatch.setattr(
        experts_module, "tensor_model_parallel_all_reduce", lambda rows: summed.append(1) or rows
    )
    unit = pooled_experts(Experts(reduce_results), 0, 0, is_last=True)  # type: ignore[arg-type]
    unit.partial(*unit.payload_of(torch.randn(3, HIDDEN), routed(3)))
    assert not summed, "an owner's service must not wait for other TP ranks"
    unit.finish(torch.randn(3, HIDDEN))
    assert bool(summed) == reduce_results

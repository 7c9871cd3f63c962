"""Mixtures of experts: units of CaS, slots, expert parallelism and DWDP."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.planner.deployment import DP_ATTENTION, DWDP, REPLICAS, SIDP, Deployment, Node
from sidp_sgl.planner.gpus import find_gpu
from sidp_sgl.planner.group_times import GroupTimes, Pooling
from sidp_sgl.planner.machine import EAGER_LAYER_SECONDS, Machine
from sidp_sgl.planner.models import load_model
from sidp_sgl.planner.plan.candidates import deployments
from sidp_sgl.planner.time_model import RankTimes, Work
from sidp_sgl.planner.weights import Split, units

H200 = Machine.from_gpu(find_gpu("H200"))
DEEPSEEK, QWEN, DENSE = map(load_model, ("DeepSeek-V3", "Qwen3-30B-A3B", "Qwen3-8B"))
batches, contexts = st.integers(1, 2048), st.integers(1, 32768)


@given(st.integers(1, 8192), st.integers(1, 16))
def test_a_row_takes_what_the_engine_s_unit_takes(hidden: int, experts_per_token: int) -> None:
    import torch

    from sidp_sgl.weightpool.cas.unit import PooledUnit, RowType

    def compute(*_: Any) -> Any: ...

    row = RowType(hidden, torch.bfloat16)
    chosen = [RowType(experts_per_token, kind) for kind in (torch.float32, torch.int32)]
    engine = PooledUnit(0, 0, True, (row, *chosen), row, compute, compute)
    shape = replace(QWEN, hidden_size=hidden, experts_per_token=experts_per_token)
    (planned,) = units(shape, 0, Split(), "ffn")
    assert planned.row_bytes == engine.row_bytes


@pytest.mark.parametrize(
    ("name", "layer", "pool", "number"),
    [
        ("DeepSeek-V3", 0, "ffn", 1),
        ("DeepSeek-V3", 3, "ffn", 2),
        ("DeepSeek-V3", 3, "linear", 2),  # latent attention is not pooled
        ("Qwen3-30B-A3B", 0, "ffn", 1),
        ("Qwen3-30B-A3B", 0, "linear", 3),
        ("Qwen3-8B", 0, "linear", 3),
    ],
)
def test_units_of_a_layer(name: str, layer: int, pool: str, number: int) -> None:
    assert len(units(load_model(name), layer, Split(), pool)) == number


def test_every_unit_is_a_round_trip() -> None:
    """58 layers with experts and shared ones, 3 with one FFN; a rank owns 7 or 8 of 61."""
    slow = replace(H200, round_trip_seconds=1.0)
    fast, slowed = (
        GroupTimes(RankTimes(DEEPSEEK, machine, Split()), Pooling(8)) for machine in (H200, slow)
    )
    work = Work.decode(8, 100)
    more = slowed.cas_seconds(work) - fast.cas_seconds(work)
    remote = fast.placement.most_slots / DEEPSEEK.num_layers
    assert more == pytest.approx((58 * 2 + 3) * remote * (1 - H200.round_trip_seconds))


@pytest.mark.parametrize(("name", "default"), [("Qwen3-8B", 3), ("Qwen3-30B-A3B", 2)])
@pytest.mark.parametrize("given", [None, 1, 4])
def test_slots(name: str, default: int, given: int | None) -> None:
    node = Node(load_model(name), H200, 8, slots=given)
    assert Deployment(node, SIDP, 1, 8, "was").group.placement.slots(0) == (given or default)


def test_what_a_mixture_is_compared_with() -> None:
    dense, moe = ({d.label: d for d in deployments(Node(m, H200, 8))} for m in (DENSE, QWEN))
    assert "DP attention TP1/DP8" in dense and not any("DWDP" in label for label in dense)
    assert "EP8, DP attention TP1/DP8" in moe and "DWDP DP8" in moe
    assert [d.kind for d in moe.values()].count(DWDP) == 1
    uneven = [d.kind for d in deployments(Node(QWEN, H200, 3))]
    assert REPLICAS in uneven and not {DWDP, DP_ATTENTION} & set(uneven)


def test_whole_experts_read_as_many_bytes_and_move_fewer_rows() -> None:
    sliced = RankTimes(QWEN, H200, Split(1, 8, 1, 8), ranks_in_ffn=8)
    whole = replace(sliced, split=Split(1, 8, 1, 8, experts=8))
    assert whole.ffn_seconds(0, 8) == pytest.approx(sliced.ffn_seconds(0, 8), rel=0.02)
    assert whole.ffn_seconds(0, 4096) < sliced.ffn_seconds(0, 4096)


@pytest.mark.parametrize("shape", [QWEN, DEEPSEEK], ids=lambda shape: shape.name)
def test_memory_of_dwdp(shape: Any) -> None:
    """An eighth of all experts, and seven eighths of two layers; scales and all else are whole."""
    node = Node(shape, H200, 8)
    dwdp, plain = Deployment(node, DWDP, 1, 8), Deployment(node, REPLICAS, 1, 8)
    width = 1 if shape.dtype == "fp8" else 2
    layer = 3 * shape.num_experts * shape.expert_size * shape.hidden_size * width
    num_layers = shape.num_layers - len(shape.dense_layers)
    assert dwdp.memory.pooled_bytes == num_layers * layer
    saved = plain.memory.weight_bytes() - dwdp.memory.weight_bytes()
    assert saved == (num_layers - 2) * layer * 7 // 8


@given(st.sampled_from([QWEN, DEEPSEEK]), batches, contexts)
def test_steps_of_dwdp(shape: Any, batch: int, context: int) -> None:
    dwdp = Deployment(Node(shape, H200, 8), DWDP, 1, 8)
    step, fetches = dwdp.decode_seconds(batch, context), dwdp.fetch_seconds()
    compute = dwdp.rank.compute_seconds(Work.decode(batch, context))
    floor = max(compute, fetches, shape.num_layers * EAGER_LAYER_SECONDS)
    assert floor < step <= dwdp.decode_seconds(batch + 1, context)
    assert step < floor + max(compute, fetches) / 10 or compute < floor


@given(st.integers(1, 4096), contexts, st.sampled_from([1, 2, 8]))
def test_latent_attention_takes_the_cheaper_way(batch: int, context: int, tp: int) -> None:
    """A decode step works on the latents, a long prefill on keys and values made of them."""
    rank = RankTimes(DEEPSEEK, H200, Split.of(tp))
    decode, heads = Work.decode(batch, context), 128 // tp
    flops = (rank.attention_seconds(decode) - H200.kernel_seconds) * H200.bf16_flops
    read = batch * context * 1152 / H200.kv_bandwidth * H200.bf16_flops
    expanded = 2 * decode.scores * heads * 320  # if keys and values were there
    latents = 2 * decode.scores * heads * 1088
    assert max(read, expanded) * (1 - 1e-6) <= flops <= max(read, latents) * (1 + 1e-6)
    if context > 1:
        assert flops == pytest.approx(max(read, latents), rel=1e-3)
    prefill = rank.attention_seconds(Work.prefill(8192, 8192)) - H200.kernel_seconds
    assert prefill == pytest.approx(8192 * 8192 * heads * 320 / H200.bf16_flops)

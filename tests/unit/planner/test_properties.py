"""What must hold of memory and time for any model, machine and setting."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidp_sgl.planner.deployment import REPLICAS, SIDP, Deployment, Node
from sidp_sgl.planner.gpus import GPUS
from sidp_sgl.planner.group_times import GroupTimes, Pooling
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import ModelShape, load_model
from sidp_sgl.planner.plan.candidates import deployments
from sidp_sgl.planner.prefetch_factor import LOADS, Prefetch, was_factor
from sidp_sgl.planner.time_model import RankTimes, Work, experts_share
from sidp_sgl.planner.weights import Split

MODELS = ["Qwen3-8B", "Qwen3-32B", "Llama-3.1-70B", "Qwen3-30B-A3B"]
models = st.sampled_from(MODELS).map(load_model)
all_models = st.sampled_from([*MODELS, "DeepSeek-V3", "Qwen3-235B-A22B-FP8"]).map(load_model)
machines = st.sampled_from(GPUS).map(Machine.from_gpu)
splits = st.sampled_from([(1, 2), (1, 8), (2, 4), (4, 2)])
pools = st.sampled_from(["ffn", "linear", "all"])
slots = st.one_of(st.none(), st.integers(1, 12))
batches = st.integers(1, 2048)
contexts = st.integers(1, 32768)


def sidp(node: Node, split: tuple[int, int], kind: str = SIDP) -> Deployment:
    return Deployment(node, kind, *split, "auto" if kind == SIDP else "")


@given(all_models, machines, splits, pools, slots, st.floats(0.1, 0.98), st.integers(0, 10**11))
def test_more_memory_never_fits_fewer_tokens(
    shape: ModelShape,
    machine: Machine,
    split: tuple[int, int],
    pool: str,
    num_slots: int | None,
    fraction: float,
    more: int,
) -> None:
    node = Node(shape, machine, 8, fraction, pool=pool, slots=num_slots)
    larger = replace(node, machine=replace(machine, memory_bytes=machine.memory_bytes + more))
    for kind in (REPLICAS, SIDP):
        tokens = sidp(node, split, kind).kv_tokens()
        assert tokens <= sidp(larger, split, kind).kv_tokens()
        assert tokens <= sidp(replace(node, mem_fraction=0.99), split, kind).kv_tokens()


@given(all_models, machines, splits, pools, st.integers(1, 100))
def test_what_sidp_saves(
    shape: ModelShape, machine: Machine, split: tuple[int, int], pool: str, num_slots: int
) -> None:
    """All that is pooled, less what the fullest rank owns, its slots and the staging; and owners
    hold every block once, evenly."""
    node = Node(shape, machine, 8, pool=pool, slots=num_slots)
    deployment = sidp(node, split)
    memory, placement = deployment.memory, deployment.group.placement
    blocks = [placement.block_bytes(block) for block in range(len(placement.blocks))]
    owned = [placement.owned_bytes(rank) for rank in range(split[1])]
    assert sum(owned) == sum(blocks) == memory.pooled_bytes
    assert max(owned) - min(owned) <= max(blocks)
    slots = max(map(placement.slots, range(split[1])))
    saved = sidp(node, split, REPLICAS).memory.weight_bytes() - memory.weight_bytes()
    assert saved == sum(blocks) - max(owned) - slots * max(blocks) - memory.staging_bytes


@given(all_models, machines, splits, batches, contexts)
def test_steps_grow_with_batch_and_context(
    shape: ModelShape, machine: Machine, split: tuple[int, int], batch: int, context: int
) -> None:
    rank = RankTimes(shape, machine, Split.of(split[0]))
    step = rank.compute_seconds(Work.decode(batch, context))
    assert 0 < step <= rank.compute_seconds(Work.decode(batch + 1, context))
    assert step <= rank.compute_seconds(Work.decode(batch, context + 1))
    # A batch is never slower than its requests one after another.
    assert step <= batch * rank.compute_seconds(Work.decode(1, context)) * (1 + 1e-9)


@settings(max_examples=40)
@given(models, machines, splits, pools, st.floats(1.01, 100), contexts)
def test_a_faster_link_lowers_the_threshold(
    shape: ModelShape,
    machine: Machine,
    split: tuple[int, int],
    pool: str,
    faster: float,
    context: int,
) -> None:
    # One GPU per rank: else the link carries the collectives as well, and compute falls with it.
    pooling = Pooling(split[1], pool)
    slow = GroupTimes(RankTimes(shape, machine, Split()), pooling)
    link = machine.link_bandwidth * faster
    quick = replace(slow, rank=replace(slow.rank, machine=replace(machine, link_bandwidth=link)))
    assert quick.fetch_seconds < slow.fetch_seconds
    assert quick.hiding_batch(context, 4096) <= slow.hiding_batch(context, 4096)
    work = Work.decode(16, context)
    assert quick.was_seconds(work) <= slow.was_seconds(work) * (1 + 1e-9)
    assert quick.cas_seconds(work) <= slow.cas_seconds(work)


@settings(max_examples=40)
@given(models, machines, splits, pools, slots, batches, contexts)
def test_bounds_of_a_group_s_step(
    shape: ModelShape,
    machine: Machine,
    split: tuple[int, int],
    pool: str,
    num_slots: int | None,
    batch: int,
    context: int,
) -> None:
    group = sidp(Node(shape, machine, 8, pool=pool, slots=num_slots), split).group
    work = Work.decode(batch, context)
    compute, was = group.rank.compute_seconds(work), group.was_seconds(work)
    assert was >= max(compute, group.fetch_seconds) * (1 - 1e-9)
    assert group.was_seconds(Work.decode(batch + 1, context)) >= was * (1 - 1e-9)
    times = [group.cas_seconds(work, active) for active in range(1, split[1] + 1)]
    assert times == sorted(times) and times[0] >= compute
    threshold = group.threshold(context, 4096)
    auto = group.decode_seconds("auto", batch, context, threshold)
    assert auto in (was, times[-1])
    if batch > group.staging.rows_per_rank:
        assert auto == was == group.decode_seconds("cas", batch, context, threshold)


@settings(max_examples=40)
@given(models, machines, splits, contexts)
def test_auto_is_never_far_from_the_better_mode(
    shape: ModelShape, machine: Machine, split: tuple[int, int], context: int
) -> None:
    """It goes by its threshold, and does not know what the order costs where the link is full."""
    group = sidp(Node(shape, machine, 8), split).group
    threshold = group.threshold(context, 4096)
    for batch in (1, 4, 16, 64):
        work = Work.decode(batch, context)
        was, cas = group.was_seconds(work), group.cas_seconds(work)
        auto = group.decode_seconds("auto", batch, context, threshold)
        assert auto <= 1.5 * min(was, cas)


def test_a_slot_for_every_layer_leaves_nothing_to_fetch() -> None:
    node = Node(load_model("Qwen3-8B"), Machine.from_gpu(GPUS[0]), 4, slots=36)
    group = sidp(node, (1, 4)).group
    work = Work.decode(1, 100)
    assert group.placement.slots(0) == 27
    assert group.fetch_seconds == 0
    assert group.was_seconds(work) == group.rank.compute_seconds(work)


@settings(max_examples=10)
@given(
    st.integers(2, 8),
    st.integers(8, 40),
    st.sampled_from(
        [
            (3, "sequential", True),
            (1, "sequential", True),
            (2, "sequential", False),
            (8, "shifted", False),
        ]
    ),
    st.sampled_from(["interleaved", "contiguous"]),
)
def test_factor_of_the_prefetch(
    num_ranks: int, num_layers: int, fetches: tuple[int, str, bool], placement: str
) -> None:
    prefetch = Prefetch(num_ranks, num_layers, *fetches, placement)
    loads = sorted({*LOADS, 0.01, 0.7, 0.999, 1.7, 2.5, 10.0})
    factors = [was_factor(prefetch, load) for load in loads]
    assert factors == sorted(factors)
    assert all(factor >= max(1.0, load) for factor, load in zip(factors, loads, strict=True))
    assert factors[loads.index(0.01)] < 1.1


def test_the_default_order_hides_fetches_up_to_a_full_link() -> None:
    for num_ranks in (2, 4, 8):
        assert (
            was_factor(Prefetch(num_ranks, 64, 3, "sequential", True, "interleaved"), 0.85) < 1.05
        )


def test_experts_that_are_read() -> None:
    assert experts_share(128, 8, 1) == pytest.approx(8 / 128)
    assert experts_share(128, 8, 16) < 16 * 8 / 128
    assert experts_share(128, 8, 10_000) == pytest.approx(1)
    assert experts_share(8, 8, 1) == 1


def test_dp_attention_shares_the_ffn_and_meets_in_it() -> None:
    node = Node(load_model("Qwen3-32B"), Machine.from_gpu(GPUS[2]), 8)
    kinds = {d.label: d for d in deployments(node)}
    whole, shared = kinds["DP8"], kinds["DP attention TP1/DP8"]
    assert shared.memory.weight_bytes() < whole.memory.weight_bytes()
    assert shared.kv_tokens() > whole.kv_tokens()
    # Eight ranks' rows over an eighth of the weights: the same work, and the collectives.
    large = shared.decode_seconds(512, 10) / whole.decode_seconds(512, 10)
    assert 1.0 < large < 1.5
    assert shared.decode_seconds(1, 10) < whole.decode_seconds(1, 10)

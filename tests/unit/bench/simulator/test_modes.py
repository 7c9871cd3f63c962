"""The simulator's steps: timed as the planner times them, chosen as the engine chooses them."""

from dataclasses import replace

import pytest

from bench.paper_anchors import TAIL
from bench.paper_jobs import run
from bench.simulator import Settings, simulate
from bench.simulator.costs import StepCosts
from bench.simulator.modes import RankModes, Service
from sidp_sgl.planner.deployment import SIDP, Deployment, Node
from sidp_sgl.planner.gpus import find_gpu
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import load_model
from sidp_sgl.planner.time_model import Work
from sidp_sgl.scheduler.modes.policy import CAS, DWELL_STEPS, WAS
from tests.unit.bench.simulator.simulated import request, requests_of, sidp


def on_gpus(model: str, pool: str = "ffn", tp: int = 2) -> Deployment:
    node = Node(load_model(model), Machine.from_gpu(find_gpu("H20")), 8, pool=pool)
    return Deployment(node, SIDP, tp, 8 // tp, "auto")


@pytest.mark.parametrize("model", ["Llama-3.1-70B", "Qwen3-235B-A22B"])
def test_costs_are_those_of_the_planner(model: str) -> None:
    deployment = on_gpus(model)
    costs, rank, group = StepCosts(deployment), deployment.rank, deployment.group
    for batch, context in ((1, 1), (7, 300), (64, 4096), (900, 1024)):
        work = Work.decode(batch, context)
        compute = costs.decode(batch, batch * context)
        assert compute == pytest.approx(rank.compute_seconds(work), rel=1e-9)
        assert costs.streamed(compute) == pytest.approx(group.was_seconds(work), rel=1e-9)
        sent = costs.sent(batch, batch * context, 3 * batch)
        assert sent == pytest.approx(group.cas_seconds(work, 3), rel=1e-9)
    for work in (Work.prefill(8192, 1024), Work.prefill(8192, 32768), Work(5, 70_000, 9e4, 1)):
        assert costs.prefill(work) == pytest.approx(rank.compute_seconds(work), rel=1e-9)


@pytest.mark.parametrize("pool", ["ffn", "linear"])
def test_service_is_an_owners_share_of_the_layers(pool: str) -> None:
    deployment = on_gpus("Llama-3.1-70B", pool)
    rank, layers = deployment.rank, deployment.node.shape.num_layers
    expected = rank.ffn_seconds(0, 48)
    if pool == "linear":
        expected += rank.projection_seconds(0, 48)
    assert StepCosts(deployment).service(48) == pytest.approx(expected * layers / 4)


def test_a_switch_comes_after_the_policys_dwell() -> None:
    """Rank 0: two requests for 4 decode steps, then one for 5; from batch 2 on it streams."""
    outputs = (10, 1, 5, 1)
    requests = [request(n, 10, output) for n, output in enumerate(outputs)]
    report = simulate(sidp(100, 2), requests, settings=Settings(batch_threshold=2))
    first, second = report.ranks
    assert first.steps[WAS] == 4 + DWELL_STEPS - 1
    assert first.steps[CAS] == 5 - (DWELL_STEPS - 1)
    assert (first.mode_switches, first.batch_threshold) == (1, 2)
    assert second.steps[WAS] == second.steps[CAS] == second.mode_switches == 0


def test_over_a_long_tail_auto_beats_both_modes() -> None:
    """Ranks that once found sending too dear, when all sent much, must come back to it."""
    case = replace(TAIL, machine="testbed", fillings=1)
    was, cas, auto = (run(case, SIDP, 1, mode).tokens_per_second for mode in (WAS, CAS, "auto"))
    assert auto > 1.05 * max(was, cas)


def test_a_job_ends_in_cas_and_is_faster_for_it() -> None:
    """Fetches last 6 s, a step's own work 1 s: below the threshold rows are sent."""
    block = sidp(100, 4).group.blocks[0]
    requests = requests_of(40, 10, 40)
    was, auto = (simulate(sidp(600, 4, mode, link=block), requests) for mode in ("was", "auto"))
    assert was.steps(CAS) == 0 and was.was_share == 1
    assert auto.steps(CAS) > 0 and auto.was_share < 1
    assert auto.makespan < 0.5 * was.makespan


def test_cas_never_sends_more_rows_than_staging_holds() -> None:
    group = sidp(100, 2).group
    block, rows = group.blocks[0], group.staging.rows_per_rank
    requests = [request(n, 5, 4) for n in range(2 * (rows + 1))]
    report = simulate(sidp(3000, 2, "cas", link=block), requests)
    assert report.steps(CAS) == 0 and report.steps(WAS) == 2 * 3
    report = simulate(sidp(3000, 2, "cas", link=block), requests[:-2])
    assert report.steps(CAS) == 2 * 3


def test_rows_of_all_senders_meet() -> None:
    service, costs = Service(4), StepCosts(on_gpus("Llama-3.1-70B"))
    ranks = [RankModes(costs, "cas", None, service, rank) for rank in range(4)]
    alone = ranks[0].decode_seconds(0.0, 8, 8000)
    second = ranks[1].decode_seconds(0.0, 16, 16000)
    assert alone == (CAS, costs.sent(8, 8000, 8))
    assert second == (CAS, costs.sent(16, 16000, 8 + 16))
    ranks[0].end_decode(alone[1], True)
    assert ranks[2].decode_seconds(0.1, 4, 4000) == (CAS, costs.sent(4, 4000, 16 + 4))


def test_an_owner_serves_all_but_itself() -> None:
    service = Service(3)
    service.load(0, 1.0, 0.25)
    service.load(1, 1.0, 0.125)
    assert [service.share(owner, 1.0) for owner in range(3)] == pytest.approx([0.125, 0.25, 0.375])
    assert service.share(2, 2.5) == 0


def test_a_busy_owner_with_work_of_its_own_declines() -> None:
    service, costs = Service(3), StepCosts(on_gpus("Llama-3.1-70B"))
    modes = RankModes(costs, "cas", None, service, 0)
    service.load(2, 1.0, 0.6)
    assert modes.decode_seconds(1.0, 8, 8000)[0] == CAS
    service.batches[2] = 1
    assert modes.decode_seconds(1.0, 8, 8000)[0] == CAS  # it serves itself only
    service.batches[1] = 1
    assert modes.decode_seconds(1.0, 8, 8000)[0] == WAS
    assert modes.decode_seconds(2.0, 8, 8000)[0] == CAS  # the second it looks back is over


def test_serving_slows_the_owners_own_stream() -> None:
    service = Service(2)
    modes = RankModes(StepCosts(on_gpus("Llama-3.1-70B")), "was", None, service, 0)
    quiet = modes.decode_seconds(1.0, 8, 8000)[1]
    service.load(1, 1.0, 0.2)
    assert modes.decode_seconds(1.0, 8, 8000)[1] == pytest.approx(quiet / 0.8)

"""Steps as CUDA graphs: the plan as pure values, and whole groups whose captured steps are executed
in any order that the graph's edges allow."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.weightpool.placement import Placement
from sidp_sgl.weightpool.schedule import ORDERS, FetchSchedule, make_schedule, shifted_slots
from sidp_sgl.weightpool.transport.cuda.driver import CudaError
from sidp_sgl.weightpool.was.captured import plan_step
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_graph import FakeGraph
from tests.support.pools import Group, RankUnderTest, run_group
from tests.support.transports import FakeCudaTransport


@st.composite
def schedules(draw: st.DrawFn, orders: tuple[str, ...] = ORDERS) -> FetchSchedule:
    ranks, layers = draw(st.integers(2, 6)), draw(st.integers(1, 14))
    placement = draw(st.sampled_from(["interleaved", "contiguous"]))
    order = draw(st.sampled_from(orders))
    blocks = Placement.of([1] * layers, ranks, 1, placement)
    least = shifted_slots(blocks) if order == "shifted" else 1
    blocks = replace(blocks, num_slots=max(1, least) + draw(st.integers(0, 4)))
    return make_schedule(blocks, draw(st.integers(0, ranks - 1)), order)


@given(schedules())
def test_every_layer_is_in_its_slot_when_it_is_computed(schedule: FetchSchedule) -> None:
    plan = plan_step(schedule)
    for _ in range(3):  # a step ends as it began, so it can follow itself
        holds, free = dict(plan.entry), set(range(schedule.num_slots)) - set(plan.entry)
        fetched = []

        def fetch(layers: tuple[int, ...], holds=holds, free=free, fetched=fetched) -> None:
            for layer in layers:
                free.remove(schedule.slot_of[layer])
                holds[schedule.slot_of[layer]] = layer
                fetched.append(layer)

        fetch(plan.first)
        for layer in sorted(schedule.order):
            assert holds[schedule.slot_of[layer]] == layer
            if not schedule.keeps_all:
                free.add(schedule.slot_of[layer])
                holds.pop(schedule.slot_of[layer])
                fetch(plan.after.get(layer, ()))
        assert holds == plan.entry
        assert sorted(fetched) == ([] if schedule.keeps_all else sorted(schedule.order))


@given(schedules(orders=("sequential",)))
def test_only_what_the_last_release_allows_is_put_off(schedule: FetchSchedule) -> None:
    plan = plan_step(schedule)
    assert len(plan.entry) + len(plan.first) == min(schedule.num_slots, len(schedule.order))
    if schedule.order and not schedule.keeps_all:
        last = schedule.slot_of[max(schedule.order)]
        assert last in {schedule.slot_of[layer] for layer in plan.first} or not plan.first
        assert schedule.order[plan.next_position] == (plan.first or (plan_next(plan, schedule),))[0]


def plan_next(plan, schedule: FetchSchedule) -> int:
    """The layer that is fetched next where nothing was put off."""
    issued = [layer for layers in plan.after.values() for layer in layers]
    return schedule.order[(schedule.order.index(issued[-1]) + 1) % len(schedule.order)]


GROUPS = [
    Group(2, 7, num_slots=1),
    Group(2, 7, num_slots=2, turns=False),
    Group(3, 8),
    Group(3, 5, stripes=True),
    Group(4, 9, kind="contiguous"),
    Group(4, 9, "shifted", turns=False),
    Group(3, 5, num_slots=50, turns=False),
    Group(2, 2),
]


def driver_of(rank: RankUnderTest) -> FakeCuda:
    transport = rank.pool.transport
    assert isinstance(transport, FakeCudaTransport)
    return transport.fake


def one_step(rank: RankUnderTest) -> None:
    with rank.pool.step():
        for layer in range(len(rank.views)):
            rank.enter(layer)
            rank.leave(layer)


def capture(rank: RankUnderTest) -> FakeGraph:
    with driver_of(rank).capture() as graph:
        one_step(rank)
    return graph


def replay(rank: RankUnderTest, graph: FakeGraph, seed: int) -> None:
    rank.pool.begin_replay()
    poison(rank)
    driver_of(rank).replay(graph, seed)


def poison(rank: RankUnderTest) -> None:
    """Overwrite, behind the work so far, the slots that the next replay has to fill."""
    slots = rank.pool.prefetcher.slots
    stale = [slot.memory for slot in slots if slot.block is None]
    driver = driver_of(rank)
    for memory in stale:
        driver.enqueue(driver.current_stream(), lambda memory=memory: memory.fill_(77))


def name_of(group: Group) -> str:
    return "-".join(str(value) for value in vars(group).values())


def transport_of(rank: int) -> FakeCudaTransport:
    return FakeCudaTransport(FakeCuda(seed=rank))


@pytest.mark.parametrize("group", GROUPS, ids=name_of)
def test_replayed_steps_see_every_layers_bytes(group: Group) -> None:
    replays = 12

    def script(rank: RankUnderTest) -> None:
        one_step(rank)  # the warm-up, as SGLang does it
        graph = capture(rank)
        for number in range(replays):
            replay(rank, graph, seed=number)

    for rank, result in enumerate(run_group(group, script, transport_of)):
        assert result.wrong == []
        schedule = group.schedule(rank)
        assert result.counters.resyncs == 0
        if not schedule.keeps_all:
            eager = len(schedule.order) + schedule.num_slots
            assert result.counters.fetches == eager + replays * len(schedule.order)


@pytest.mark.parametrize("group", GROUPS, ids=name_of)
def test_graphs_and_eager_steps_follow_each_other(group: Group) -> None:
    """Prefill is eager, decode a graph of one of several batch sizes; steps may be cut short."""

    def script(rank: RankUnderTest) -> None:
        one_step(rank)
        graphs = [capture(rank), capture(rank)]
        dice = random.Random(rank.pool.rank)
        for number in range(20):
            what = dice.choice(["graph", "graph", "eager", "short"])
            if what == "graph":
                replay(rank, dice.choice(graphs), seed=number)
            elif what == "eager":
                one_step(rank)
            else:
                rank.enter(dice.randrange(len(rank.views)))

    for result in run_group(group, script, transport_of):
        assert result.wrong == []


def test_replays_in_a_row_have_no_host_work() -> None:
    def script(rank: RankUnderTest) -> None:
        one_step(rank)
        graph = capture(rank)
        replay(rank, graph, seed=1)
        driver, asked = driver_of(rank), []
        for name in ("record", "wait", "copy", "run", "create_event"):
            setattr(driver, name, lambda *_, name=name: asked.append(name))
        for _ in range(3):
            rank.pool.begin_replay()
        assert asked == []

    for rank, result in enumerate(run_group(Group(3, 8), script, transport_of)):
        fetched = len(Group(3, 8).schedule(rank).order)
        assert result.counters.fetches == fetched + 3 + 4 * fetched


def wrong_uses(group: Group, fault: str) -> int:
    def script(rank: RankUnderTest) -> None:
        one_step(rank)
        graph = capture(rank)
        for number in range(12):
            rank.pool.begin_replay()
            poison(rank)
            driver = driver_of(rank)
            dice = random.Random(number)
            driver.enqueue(
                driver.current_stream(),
                lambda dice=dice: graph.execute(dice, ignore_edges=fault == "edges"),
            )

    return sum(len(result.wrong) for result in run_group(group, script, transport_of))


def test_negative_control_without_the_graphs_edges() -> None:
    assert wrong_uses(Group(3, 8, num_slots=2, turns=False), "edges") > 0
    assert wrong_uses(Group(3, 8, num_slots=2, turns=False), "none") == 0


def test_the_fake_graph_refuses_what_cuda_refuses() -> None:
    driver = FakeCuda()
    outside, inside = driver.create_event(), driver.create_event()
    side = driver.create_stream()
    driver.record(outside, driver.current_stream())
    with pytest.raises(CudaError, match="ISOLATION"), driver.capture():
        driver.wait(driver.current_stream(), outside)
    with pytest.raises(CudaError, match="UNJOINED"), driver.capture():
        driver.enqueue(driver.current_stream(), lambda: None)
        driver.record(inside, driver.current_stream())
        driver.wait(side, inside)
        driver.enqueue(side, lambda: None)
    with pytest.raises(CudaError, match="CAPTURED_EVENT"):
        driver.wait(driver.current_stream(), inside)

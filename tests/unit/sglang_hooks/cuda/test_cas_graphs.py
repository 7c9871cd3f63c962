"""CaS steps as graphs with the host's calls in between: SGLang's own splitting, real pools, calls
and services, and graphs that call PyTorch's operators again."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidp_sgl.sglang_hooks.cuda.graphs import GraphHooks
from sidp_sgl.weightpool.cas.requester import Requester
from sidp_sgl.weightpool.cas.unit import PooledUnit
from sidp_sgl.weightpool.execution import UnitExecution
from tests.support.cas import endpoints, rows_unit
from tests.support.pools import Group, RankUnderTest, layer_tensors, run_group
from tests.support.torch_graph import RecordedGraph

WIDTH, OUT_WIDTH = 8, 40
SIZES = (1, 4, 64, 100, 200)  # of captured batches
STEPS = 40


@pytest.fixture(autouse=True)
def graphs_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)


def make_unit(layer: int, get_weight: Any) -> PooledUnit:
    def compute(rows: torch.Tensor) -> torch.Tensor:
        return rows @ get_weight().float().t()

    return rows_unit(layer, layer, WIDTH, OUT_WIDTH, compute)


def model(run: Any, units: list[PooledUnit], rows: torch.Tensor) -> torch.Tensor:
    for unit in units:
        rows = rows + 0.1 * run(unit, torch.tanh(rows))[:, :WIDTH]
    return 2 * rows


def expected(num_layers: int, rows: torch.Tensor) -> torch.Tensor:
    units = [make_unit(n, lambda n=n: layer_tensors(n)["down.weight"]) for n in range(num_layers)]
    return model(lambda unit, x: unit.partial(x), units, rows)


class Backend:
    """SGLang's, as far as the hooks know it."""

    _pool = _capture_stream = None
    _cuda_graph_runner = SimpleNamespace(capture_bs=list(SIZES))


class Engine:
    """A rank's decode steps, with graphs of all sizes for both modes. A WaS step's fetches are
    another test's: here such steps are eager."""

    def __init__(self, group: Group, rank: RankUnderTest, remote: Requester | None) -> None:
        self.group, self.rank, self.remote = group, rank, remote
        self.execution = UnitExecution(rank.pool, remote)
        self.hooks = GraphHooks(rank.pool, self.execution)
        self.units = [
            make_unit(n, lambda n=n: rank.views[n]["down.weight"]) for n in range(group.num_layers)
        ]
        self.inputs = torch.zeros(max(SIZES), WIDTH)
        for size in reversed(SIZES):
            self.hooks._cas.capture(Backend(), ShapeKey(size), self._forward(size))

    def _forward(self, size: int) -> Any:
        return lambda: model(self.execution.run, self.units, self.inputs[:size])

    def step(self, rows: torch.Tensor, *, is_cas: bool) -> torch.Tensor:
        if not is_cas:
            return model(self.execution.run, self.units, rows)
        assert self.remote is not None
        size = next(size for size in SIZES if size >= len(rows))
        self.inputs[: len(rows)] = rows
        self.remote.begin_step(len(rows))
        output = self.hooks._replay(None, Backend(), ShapeKey(size))
        self.remote.end_step()
        assert not output[len(rows) :].isnan().any(), "rows that fill the batch are numbers"
        return output[: len(rows)]


class ShapeKey(int):
    """Equal where sizes are, as SGLang's."""

    @property
    def size(self) -> int:
        return int(self)


@pytest.mark.parametrize("num_ranks,num_layers,num_slots", [(2, 7, None), (3, 8, 1)])
def test_results_are_right_whatever_the_modes(
    num_ranks: int, num_layers: int, num_slots: int | None
) -> None:
    group = Group(num_ranks, num_layers, num_slots=num_slots)
    wrong: list[Any] = []
    replays = [0] * num_ranks
    owner_units = [
        make_unit(n, lambda n=n: layer_tensors(n)["down.weight"]) for n in range(num_layers)
    ]
    with endpoints(num_ranks, owner_units, group.owners()) as groups:

        def run(rank: RankUnderTest) -> None:
            number = rank.pool.rank
            dice, remote = random.Random(number), groups[number].requester
            engine = Engine(group, rank, remote)
            call = remote.call

            def unreliable(*args: Any) -> Any:
                if dice.random() < 0.1:
                    remote._fall_back()  # as after a silence
                    return None
                return call(*args)

            remote.call = unreliable  # type: ignore[method-assign]
            # Else a CaS step for other TP ranks, which this one has to replay as well.
            remote.is_available = lambda: dice.random() < 0.9  # type: ignore[method-assign]
            for step in range(STEPS):
                rows = torch.randn(dice.choice([1, 3, 4, 50, 64]), WIDTH)
                is_cas = dice.random() < 0.6
                replays[number] += is_cas
                output = engine.step(rows, is_cas=is_cas)
                if not torch.allclose(output, expected(num_layers, rows), atol=1e-4):
                    wrong.append((number, step))

        run_group(group, run)
        counters = [part.counters() for part in groups]
    assert not wrong
    assert [counter["replays"] for counter in counters] == replays and min(replays) > 0
    assert sum(counter["rows_sent"] for counter in counters) > 0
    assert sum(counter["fallbacks"] for counter in counters) > 0


def test_own_layers_are_in_the_graphs_and_others_between_them() -> None:
    group = Group(2, 8)
    units = [make_unit(n, lambda n=n: layer_tensors(n)["down.weight"]) for n in range(8)]
    seen = {}
    with endpoints(2, units, group.owners()) as groups:

        def run(rank: RankUnderTest) -> None:
            if rank.pool.rank:
                return
            engine = Engine(group, rank, groups[0].requester)
            seen["fetches"] = rank.pool.prefetcher.counters.fetches
            seen["graphs"] = engine.hooks._cas._graphs
            engine.step(torch.randn(3, WIDTH), is_cas=True)
            seen["counters"] = groups[0].counters()

        before = make_slots(group)
        run_group(group, run)
    assert seen["fetches"] == before, "capturing neither fetches nor calls"
    graphs = seen["graphs"]
    assert sorted(graphs) == [1, 4, 64], "a CaS step has 64 rows at most"
    for graph in graphs.values():
        assert len(graph._segments) == 5 and len(graph._break_fns) == 4
    assert [segment.replays for segment in graphs[4]._segments] == [1] * 5
    assert not any(segment.replays for segment in graphs[64]._segments)
    assert seen["counters"]["calls"] == 4 - before and seen["counters"]["replays"] == 1


def make_slots(group: Group) -> int:
    """Layers that lie in slots from the start."""
    return min(group.placement().num_slots, group.num_layers // 2)


def test_a_group_without_calls_captures_none() -> None:
    group = Group(2, 4)

    def run(rank: RankUnderTest) -> None:
        assert not Engine(group, rank, None).hooks._cas._graphs

    run_group(group, run)

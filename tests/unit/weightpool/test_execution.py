"""Units of a whole group over real pools and calls, while the ranks change their modes at random:
the right results at every layer, and slots that are used or dropped safely."""

import random

import pytest
import torch

from sidp_sgl.weightpool.cas.requester import Requester
from sidp_sgl.weightpool.cas.unit import PooledUnit
from sidp_sgl.weightpool.execution import UnitExecution
from tests.support.cas import endpoints, make_rows, rows_unit
from tests.support.pools import Group, RankUnderTest, layer_tensors, run_group

IN_WIDTH, OUT_WIDTH = 8, 40
STEPS = 60


def weight(layer: int) -> torch.Tensor:
    return layer_tensors(layer)["down.weight"].float()  # [40, 8]


def make_unit(layer: int, number: int, is_last: bool, get_weight) -> PooledUnit:
    def compute(rows: torch.Tensor) -> torch.Tensor:
        return rows @ get_weight().float().t()

    return rows_unit(number, layer, IN_WIDTH, OUT_WIDTH, compute, is_last=is_last)


def owner_units(num_layers: int) -> list[PooledUnit]:
    return [make_unit(n, n, True, lambda n=n: weight(n)) for n in range(num_layers)]


class ModesAtRandom:
    """A rank's script: steps in random modes, some of which lose an owner in the middle."""

    def __init__(self, group: Group, rank: int, remote: Requester) -> None:
        self.group, self.rank, self.remote = group, rank, remote
        self.wrong: list[tuple[int, int]] = []
        self.sent = 0

    def __call__(self, rank: RankUnderTest) -> None:
        random_ = random.Random(self.rank)
        execution = UnitExecution(rank.pool, self.remote)
        units = [
            make_unit(n, n, True, lambda n=n: rank.views[n]["down.weight"])
            for n in range(self.group.num_layers)
        ]
        for step in range(STEPS):
            num_rows = random_.randint(1, 6)
            is_cas = random_.random() < 0.5
            fails_at = random_.choice([None, None, random_.randrange(len(units))])
            if is_cas:
                self.remote.begin_step(num_rows)
            for unit in units:
                if unit.block == fails_at and self.remote.is_active:
                    self.remote._fall_back()  # as after a silence
                if self.remote.is_active and not rank.pool.holds(unit.block):
                    self.sent += num_rows
                rows = make_rows(num_rows, seed=step)[:, :IN_WIDTH]
                expected = rows @ weight(unit.block).t()
                if not torch.equal(execution.run(unit, rows), expected):
                    self.wrong.append((step, unit.block))
            self.remote.end_step()


@pytest.mark.parametrize("order", ["sequential", "shifted"])
@pytest.mark.parametrize("num_ranks,num_layers,num_slots", [(2, 7, None), (3, 8, 1), (4, 9, 3)])
def test_results_are_right_whatever_the_modes(
    order: str, num_ranks: int, num_layers: int, num_slots: int | None
) -> None:
    group = Group(num_ranks, num_layers, order, num_slots=None if order == "shifted" else num_slots)
    scripts: list[ModesAtRandom] = []

    def run(rank: RankUnderTest) -> None:
        scripts[rank.pool.rank](rank)

    with endpoints(num_ranks, owner_units(num_layers), group.owners()) as groups:
        scripts += [ModesAtRandom(group, n, part.requester) for n, part in enumerate(groups)]
        run_group(group, run)
        assert [script.wrong for script in scripts] == [[]] * num_ranks
        sent = [part.counters()["rows_sent"] for part in groups]
        assert sent == [script.sent for script in scripts] and sum(sent) > 0
        assert sum(part.counters()["rows_served"] for part in groups) == sum(sent)


def test_slots_stay_as_they_are_through_cas_steps() -> None:
    """Prefetched layers are computed here, nothing is fetched, and WaS goes on where it was."""
    group = Group(2, 8)
    seen = {}

    with endpoints(2, owner_units(8), group.owners()) as groups:

        def run(rank: RankUnderTest) -> None:
            if rank.pool.rank:
                return
            units = [
                make_unit(n, n, True, lambda n=n: rank.views[n]["down.weight"]) for n in range(8)
            ]
            execution = UnitExecution(rank.pool, groups[0].requester)
            rows = make_rows(2)[:, :IN_WIDTH]

            def step(is_cas: bool) -> tuple[int, int]:
                counters = rank.pool.prefetcher.counters
                fetches, sent = counters.fetches, groups[0].requester.counters.rows_sent
                if is_cas:
                    groups[0].requester.begin_step(2)
                for unit in units:
                    execution.run(unit, rows)
                groups[0].requester.end_step()
                return counters.fetches - fetches, groups[0].requester.counters.rows_sent - sent

            seen["steps"] = [step(mode) for mode in (False, True, True, False, True)]
            seen["resyncs"] = rank.pool.prefetcher.counters.resyncs

        run_group(group, run)
    # Four layers are fetched, three of which lie in slots when a step ends: one is sent.
    assert seen["steps"] == [(4, 0), (0, 2), (0, 2), (4, 0), (0, 2)]
    assert seen["resyncs"] == 0


def test_several_units_of_a_layer_share_its_slot() -> None:
    group = Group(2, 4, num_slots=1)
    wrong = []
    owners = group.owners()
    numbering = [(layer, part) for layer in range(4) for part in range(2)]
    served = [
        make_unit(layer, n, part == 1, lambda layer=layer: weight(layer))
        for n, (layer, part) in enumerate(numbering)
    ]
    with endpoints(2, served, owners) as groups:

        def run(rank: RankUnderTest) -> None:
            execution = UnitExecution(rank.pool, groups[rank.pool.rank].requester)
            units = [
                make_unit(layer, n, part == 1, lambda n=layer: rank.views[n]["down.weight"])
                for n, (layer, part) in enumerate(numbering)
            ]
            random_ = random.Random(rank.pool.rank)
            for _ in range(40):
                remote = groups[rank.pool.rank].requester
                if random_.random() < 0.5:
                    remote.begin_step(3)
                fails_at = random_.randrange(2 * len(units))
                for n, unit in enumerate(units):
                    if n == fails_at and remote.is_active:
                        remote._fall_back()  # also between two units of a layer
                    rows = make_rows(3, seed=n)[:, :IN_WIDTH]
                    if not torch.equal(execution.run(unit, rows), rows @ weight(unit.block).t()):
                        wrong.append(n)
                remote.end_step()

        run_group(group, run)
    assert wrong == []

"""Blocks that stay in lent memory: the right bytes at every use, whatever is lent and dropped when,
and whatever is written to the memory when it has gone back."""

import random

import pytest
import torch

from sidp_sgl.weightpool.transport.interface import Transport
from tests.support.hazards import HazardousTransport
from tests.support.pools import Group, RankUnderTest, run_group
from tests.support.transports import KINDS, make_transport

GROUPS = [
    Group(2, 7, num_slots=1),
    Group(2, 7, num_slots=2, turns=False),
    Group(3, 8),
    Group(3, 5, stripes=True),
    Group(4, 9, "shifted", turns=False),
    Group(2, 2),
]


class Lending:
    """Memory for every block of a rank, which others write to while it is not lent."""

    def __init__(self, rank: RankUnderTest) -> None:
        self.pool = rank.pool
        size = self.pool.placement.slot_bytes(self.pool.rank)
        self.memory = [self.pool.transport.empty(size) for _ in self.pool.passing()]
        self.lent: dict[int, torch.Tensor] = {}
        self.write(self.memory)

    def write(self, memory: list[torch.Tensor]) -> None:
        """As tokens do."""
        for piece in memory:
            self.pool.transport.compute_stream.launch(lambda piece=piece: piece.fill_(77))

    def keep(self, block: int) -> None:
        self.lent[block] = self.memory.pop()
        self.pool.keep(block, self.lent[block])

    def drop(self, block: int) -> None:
        memory = self.lent.pop(block)
        self.pool.drop(block)
        self.write([memory])
        self.memory.insert(0, memory)


def change_at_random(seed: int):
    """Some steps, between which blocks come to stay and go."""

    def script(rank: RankUnderTest) -> None:
        dice = random.Random(seed + rank.pool.rank)
        lending = Lending(rank)
        for _ in range(12):
            rank.run_steps(1)
            for block in rank.pool.passing():
                if dice.random() < 0.4:
                    lending.keep(block)
            for block in list(lending.lent):
                if dice.random() < 0.3:
                    lending.drop(block)

    return script


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: f"{group.num_ranks}-{group.num_layers}")
def test_blocks_that_come_and_go_have_their_bytes(group: Group, kind: str) -> None:
    for result in run_group(group, change_at_random(1), lambda rank: make_transport(kind, rank)):
        assert result.wrong == []


@pytest.mark.parametrize("seed", range(4))
def test_late_copies_and_late_kernels_change_nothing(seed: int) -> None:
    def transport(rank: int) -> Transport:
        return HazardousTransport(seed * 10 + rank, reorder=False)

    for result in run_group(Group(3, 8), change_at_random(seed), transport):
        assert result.wrong == []


def test_negative_control_without_the_events() -> None:
    def wrong(**fault: bool) -> int:
        results = run_group(
            Group(3, 8),
            change_at_random(5),
            lambda rank: HazardousTransport(rank, reorder=True, **fault),
        )
        return sum(len(result.wrong) for result in results)

    assert wrong() == 0
    assert wrong(ignore_ready=True) > 0
    assert wrong(ignore_released=True) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_blocks_here_nothing_is_fetched(kind: str) -> None:
    def script(rank: RankUnderTest) -> None:
        lending, pool = Lending(rank), rank.pool
        rank.run_steps(1)
        assert not pool.is_local
        for block in pool.passing():
            lending.keep(block)
        rank.run_steps(1)
        pool.transport.copy_stream.synchronize()
        assert pool.is_local and pool.passing() == []
        before = pool.prefetcher.counters.fetches
        rank.run_steps(3)
        assert pool.prefetcher.counters.fetches == before
        first = pool.prefetcher.order[0]
        lending.drop(first)
        assert not pool.is_local and pool.passing() == [first]
        rank.run_steps(3)
        assert pool.prefetcher.counters.fetches == before + 4  # the next step's, too

    for result in run_group(Group(2, 8), script, lambda rank: make_transport(kind)):
        assert result.wrong == []


def test_one_that_goes_is_fetched_for_the_next_step() -> None:
    """Whichever it is, the prefetch begins where the step does."""

    def script(rank: RankUnderTest) -> None:
        lending, pool = Lending(rank), rank.pool
        for block in reversed(pool.passing()):
            lending.keep(block)
        for block in pool.prefetcher.order:
            rank.run_steps(1)
            lending.drop(block)
            rank.run_steps(2)
            assert pool.prefetcher.counters.resyncs == 0
            lending.keep(block)

    for result in run_group(Group(2, 10), script):
        assert result.wrong == []


def test_fewer_blocks_are_fetched_when_some_stay() -> None:
    def script(rank: RankUnderTest) -> None:
        lending, pool = Lending(rank), rank.pool
        rank.run_steps(2)
        lending.keep(pool.passing()[1])
        rank.run_steps(1)
        before = pool.prefetcher.counters.fetches
        rank.run_steps(5)
        assert pool.prefetcher.counters.fetches - before == 5 * (len(pool.prefetcher.order) - 1)
        assert pool.prefetcher.counters.resyncs == 0

    for result in run_group(Group(2, 10), script):
        assert result.wrong == []

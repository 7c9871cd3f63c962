"""Discrete-event model of the prefetch (WaS): how long a step takes for an order and slot count.

It takes the project's own schedules, so what it says is about the code and not about a sketch of
it. Time is in units of one layer's compute, τ.
"""

import random
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from sidp_sgl.weightpool.placement import Placement
from sidp_sgl.weightpool.schedule import FetchSchedule, make_schedule

_EPSILON = 1e-9
_NEVER = float("inf")


@dataclass(frozen=True)
class Setting:
    """What is modelled; times over τ.

    `fetch`: one block at the full rate of an owner's link. `jitter`: standard deviation of one
    layer's compute (normal distribution). `start_spread`: ranks begin at random times up to this.
    """

    num_ranks: int
    num_layers: int
    num_slots: int
    fetch: float
    order: str = "sequential"
    turns: bool = True  # an owner serves one reader at a time, first come, first served
    jitter: float = 0.0
    start_spread: float = 0.0
    placement: str = "interleaved"


class StepTime(NamedTuple):
    """Median step time over the ideal (number of layers · τ)."""

    all_ranks: float
    slowest_rank: float


def relative_step_time(
    setting: Setting, num_steps: int = 20, warm_up: int = 20, seed: int = 0
) -> StepTime:
    """Step time after `warm_up` steps.

    Without jitter, ranks that start together share links in lock-step for ever: the worst case,
    and unstable (of n readers, one that is ahead by x is ahead by (n - 1)·x a fetch later). What
    machines do, whose ranks never keep step, is shown with some jitter and a `start_spread`.
    """
    ranks = [times[warm_up:] for times in step_times(setting, warm_up + num_steps, seed)]
    return StepTime(
        median(time for times in ranks for time in times) / setting.num_layers,
        max(median(times) for times in ranks) / setting.num_layers,
    )


def step_times(setting: Setting, num_steps: int, seed: int = 0) -> list[list[float]]:
    """Duration of every step of every rank, in units of τ."""
    return _Group(setting, num_steps, random.Random(seed)).run()


@dataclass
class _Rank:
    """One rank's compute and its copy stream, which has one fetch under way at a time."""

    schedule: FetchSchedule
    holds: list[int | None]  # slot → the layer that it holds or is being filled with
    free: list[bool]  # slot → the next fetch may take it
    layer: int = 0  # that is computed or waited for
    step: int = 0
    compute_end: float = _NEVER  # of the layer under way; never while waiting for its block
    position: int = 0  # in `order` of the next fetch
    fetching: int | None = None  # layer
    left: float = 0.0  # of the fetch under way, in time at the full rate
    step_start: float = 0.0
    durations: list[float] = field(default_factory=list)


class _Group:
    """All ranks and the links of the owners between them."""

    def __init__(self, setting: Setting, num_steps: int, dice: random.Random) -> None:
        self._setting = setting
        self._num_steps = num_steps
        self._dice = dice
        placement = Placement.of(
            [1] * setting.num_layers, setting.num_ranks, setting.num_slots, setting.placement
        )
        self._owners = [placement.owners(layer)[0] for layer in range(setting.num_layers)]
        self._readers: list[list[_Rank]] = [[] for _ in range(setting.num_ranks)]  # by arrival
        self._ranks = []
        for rank in range(setting.num_ranks):
            schedule = make_schedule(placement, rank, setting.order)
            slots = schedule.num_slots
            self._ranks.append(_Rank(schedule, [None] * slots, [True] * slots))

    def run(self) -> list[list[float]]:
        now = 0.0
        for rank in self._ranks:
            self._begin_fetch(rank)
            # As if the compute of a layer before the first ended then.
            rank.layer = -1
            rank.compute_end = self._dice.uniform(0.0, self._setting.start_spread)
        while any(len(rank.durations) < self._num_steps for rank in self._ranks):
            rates = [self._rate(rank) for rank in self._ranks]
            ends = [
                now + rank.left / rate if rate else _NEVER
                for rank, rate in zip(self._ranks, rates, strict=True)
            ]
            later = min(*ends, *(rank.compute_end for rank in self._ranks))
            assert later < _NEVER, "the schedule deadlocks"
            for rank, rate in zip(self._ranks, rates, strict=True):
                rank.left -= rate * (later - now)
            now = later
            for rank, end in zip(self._ranks, ends, strict=True):
                if end <= now + _EPSILON:
                    self._end_fetch(rank, now)
            for rank in self._ranks:
                if rank.compute_end <= now + _EPSILON:
                    self._end_compute(rank, now)
        return [rank.durations[: self._num_steps] for rank in self._ranks]

    def _rate(self, rank: _Rank) -> float:
        """Share of an owner's link that this rank's fetch has now."""
        if rank.fetching is None:
            return 0.0
        readers = self._readers[self._owners[rank.fetching]]
        if self._setting.turns:
            return 1.0 if readers[0] is rank else 0.0
        return 1.0 / len(readers)

    def _begin_fetch(self, rank: _Rank) -> None:
        if rank.fetching is not None or not rank.schedule.order:
            return
        layer = rank.schedule.order[rank.position]
        slot = rank.schedule.slot_of[layer]
        if not rank.free[slot]:
            return
        rank.free[slot], rank.holds[slot] = False, None
        rank.fetching, rank.left = layer, self._setting.fetch
        rank.position = (rank.position + 1) % len(rank.schedule.order)
        self._readers[self._owners[layer]].append(rank)

    def _end_fetch(self, rank: _Rank, now: float) -> None:
        layer = rank.fetching
        assert layer is not None
        # By identity: dataclasses compare by value.
        readers = self._readers[self._owners[layer]]
        readers[:] = [reader for reader in readers if reader is not rank]
        rank.holds[rank.schedule.slot_of[layer]] = layer
        rank.fetching = None
        self._begin_fetch(rank)
        self._begin_compute(rank, now)

    def _begin_compute(self, rank: _Rank, now: float) -> None:
        if rank.compute_end < _NEVER:
            return
        slot = rank.schedule.slot_of.get(rank.layer)
        if slot is None or rank.holds[slot] == rank.layer:
            jitter = self._setting.jitter
            rank.compute_end = now + max(0.0, self._dice.gauss(1.0, jitter) if jitter else 1.0)

    def _end_compute(self, rank: _Rank, now: float) -> None:
        rank.compute_end = _NEVER
        slot = rank.schedule.slot_of.get(rank.layer)
        if slot is not None and not rank.schedule.keeps_all:
            rank.free[slot] = True
        rank.layer += 1
        if rank.layer == 0:
            rank.step_start = now
        if rank.layer == self._setting.num_layers:
            rank.layer = 0
            rank.durations.append(now - rank.step_start)
            rank.step_start = now
        self._begin_fetch(rank)
        self._begin_compute(rank, now)

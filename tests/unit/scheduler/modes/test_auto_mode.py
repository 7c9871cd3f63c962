"""Mode `auto` in the long run: estimates, retries and policy against machines of known times."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from sidp_sgl.scheduler.modes.policy import CAS, WAS, ModePolicy
from sidp_sgl.scheduler.modes.step_modes import StepModes
from sidp_sgl.scheduler.modes.times import StepTimes

MAX_ROWS = 64
FETCH = 0.065
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LEARNING, STEPS = 96, 224  # at each batch size
GRANTING: Any = SimpleNamespace(  # owners that never decline
    acquire=lambda rows, patience: True, ask=lambda rows: None, release=lambda: None
)


def compute(batch: int) -> float:
    return 0.010 + 0.001 * batch


class Machine:
    """What a step takes: (seconds, of them stalled). `beside`: what copies take from the compute;
    `noise`: how much longer compute takes at times, for some twenty steps."""

    def __init__(self, beside: float, noise: float, seed: int) -> None:
        self._beside, self._noise = beside, noise
        self._random = random.Random(seed)
        self._level = 1.0

    def step(self, mode: str, batch: int) -> tuple[float, float]:
        if self._noise and self._random.random() < 0.05:
            self._level = 1 + max(0.0, self._random.gauss(self._noise, self._noise))
        local = compute(batch) + (0.002 + self._beside if mode == WAS else 0.005 + 1e-4 * batch)
        local *= self._level + (abs(self._random.gauss(0, 0.1)) if self._noise else 0.0)
        stall = max(0.0, FETCH - local) if mode == WAS else 0.0
        return local + stall, stall


def mean_steps(mode: str, machine: Machine) -> dict[int, float]:
    """Batch size → mean step in `--sidp-mode` `mode`."""
    modes = StepModes(ModePolicy(mode), GRANTING, max_rows=MAX_ROWS)
    modes.times = StepTimes(FETCH, {batch: compute(batch) for batch in BATCHES})
    seconds: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for batch in BATCHES:
        for _ in range(LEARNING + STEPS):
            chosen = modes.begin_decode(batch, can_call=True)
            took, stall = machine.step(chosen, batch)
            modes.times.observe(chosen, batch, took, stall)
            modes.end_decode(batch, chosen)
            seconds[batch].append(took)
    return {batch: sum(all_[LEARNING:]) / STEPS for batch, all_ in seconds.items()}


@pytest.mark.parametrize("beside", [0.0, 0.006, 0.012, 0.030])
def test_auto_is_as_fast_as_the_better_mode(beside: float) -> None:
    was, cas, auto = (mean_steps(mode, Machine(beside, 0.0, 0)) for mode in (WAS, CAS, "auto"))
    for batch in BATCHES:
        assert auto[batch] <= 1.05 * min(was[batch], cas[batch])


@pytest.mark.parametrize("beside", [0.0, 0.006, 0.012, 0.030])
def test_so_it_is_on_a_machine_that_others_disturb(beside: float) -> None:
    seeds = range(8)
    runs = [
        [mean_steps(mode, Machine(beside, 0.3, seed)) for seed in seeds]
        for mode in (WAS, CAS, "auto")
    ]
    for batch in BATCHES:
        was, cas, auto = (sum(run[batch] for run in of_mode) for of_mode in runs)
        assert auto <= 1.10 * min(was, cas)

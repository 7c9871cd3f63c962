"""How much longer a WaS step takes than its compute, from the event model of the prefetch.

The event model runs the project's own schedules; here it is asked at a few loads only, once per
setting, and what lies between is interpolated.
"""

from bisect import bisect_left
from functools import cache
from typing import NamedTuple

from sidp_sgl.planner.event_model import Setting, relative_step_time

LOADS = (0.0, 0.6, 0.85, 1.0, 1.3, 2.0)  # fetches of a step over its compute
_LAYERS = 32  # where slots are few; more change little and take long
_STEPS = 5
_JITTER = 0.05  # ranks of a machine never keep step for long
_SEEDS = (0, 1, 2)


class Prefetch(NamedTuple):
    """A group's prefetch; the same words as the flags."""

    num_ranks: int
    num_layers: int
    num_slots: int
    order: str
    turns: bool
    placement: str


def was_factor(prefetch: Prefetch, load: float) -> float:
    """WaS step over its compute at `load`, the fetches of a step over its compute.

    At least 1 and at least `load`; grows with `load`, and no faster than it.
    """
    if load >= LOADS[-1]:
        return load * _at_node(prefetch, len(LOADS) - 1) / LOADS[-1]
    right = max(1, bisect_left(LOADS, load))
    low, high = (_at_node(prefetch, node) for node in (right - 1, right))
    return low + (high - low) * (load - LOADS[right - 1]) / (LOADS[right] - LOADS[right - 1])


@cache
def _at_node(prefetch: Prefetch, node: int) -> float:
    """The event model has several rhythms in one setting: averaged over seeds. More fetches never
    make a step shorter, nor does more compute."""
    if node == 0:
        return 1.0
    num_ranks = prefetch.num_ranks
    num_layers = min(prefetch.num_layers, max(_LAYERS, 4 * prefetch.num_slots))
    # All fetches of a rank, (d - 1)/d of its layers, take `load` times its compute.
    fetch = LOADS[node] * num_ranks / (num_ranks - 1)
    setting = Setting(
        num_ranks,
        num_layers,
        prefetch.num_slots,
        fetch,
        order=prefetch.order,
        turns=prefetch.turns,
        jitter=_JITTER,
        start_spread=num_layers,
        placement=prefetch.placement,
    )
    times = [
        relative_step_time(setting, num_steps=_STEPS, warm_up=_STEPS, seed=seed).all_ranks
        for seed in _SEEDS
    ]
    lighter, lighter_load = _at_node(prefetch, node - 1), LOADS[node - 1]
    factor = max(LOADS[node], lighter, sum(times) / len(times))
    return min(factor, lighter * LOADS[node] / lighter_load) if lighter_load else factor

"""Which order of fetches hides them with the fewest slots? Measured without an engine.

The ranks of one group run as threads on the real pool over the real `shm` transport; its links
are paced, so that one fetch takes f; the compute of a layer is a sleep to an absolute deadline, τ
after the last. Measured is the step time over the ideal (layers · τ), once the ranks have run a
few steps from a common start. Beside it stands what the event model says for the same setting:
with 2 % jitter and a random start, as on any real machine, and with ranks in perfect lock-step for
ever.
"""

import argparse
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench.record import record, spread
from bench.tables import Table, plain, ranged
from sidp_sgl.planner.event_model import Setting, relative_step_time
from sidp_sgl.weightpool.layout import make_layout
from sidp_sgl.weightpool.placement import DEFAULT_SLOTS, Placement
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.transport.shm.transport import ShmTransport

BLOCK_BYTES = 64 * 1024  # small, so that copying it takes no time; the paced link does
FETCHES = (0.5, 0.9, 1.0)  # f/τ
STALLED = 0.1  # of τ: a longer wait for a block moves all later deadlines
NOISE = 0.02  # jitter of the event model's second figure
BUSY = 0.25  # of τ: a run whose sleeps were late by more (p99) says nothing and is repeated
MAX_TRIES = 3
TOLERANCE = 0.03  # of the ideal step time: what counts as equally good

# Order of the fetches, and whether readers take turns at an owner.
IN_ORDER, SHIFTED, IN_TURNS = ("sequential", False), ("shifted", False), ("sequential", True)


def plan(num_layers: int, quick: bool) -> list[Setting]:
    settings = []
    for num_ranks in (4, 8):
        cycle = num_ranks - 1
        choices = [(IN_ORDER, cycle), (SHIFTED, cycle), (IN_TURNS, 2), (IN_TURNS, 3)]
        if not quick:
            choices += [(IN_TURNS, 1)] + [(IN_ORDER, 3)] * (cycle > 3)
        for fetch in FETCHES:
            settings += [
                Setting(num_ranks, num_layers, slots, fetch, *order) for order, slots in choices
            ]
            if fetch >= 0.9 and not quick:
                settings += [
                    Setting(num_ranks, num_layers, slots, fetch, *IN_TURNS, jitter=0.1)
                    for slots in (2, 3)
                ]
    return settings


def connected_pools(setting: Setting, tau: float) -> list[WeightPool]:
    """The group's pools, blocks filled and ranks connected, not started."""
    placement = Placement.of(
        [BLOCK_BYTES] * setting.num_layers,
        setting.num_ranks,
        setting.num_slots,
        setting.placement,
    )
    rate = BLOCK_BYTES / (setting.fetch * tau)
    layout = make_layout([("weight", torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="meta"))])
    pools = []
    for rank in range(setting.num_ranks):
        pool = WeightPool(
            ShmTransport(rate), rank, placement, setting.order, takes_turns=setting.turns
        )
        pool.own({layer: layout for layer in range(setting.num_layers) if pool.owns(layer)})
        pools.append(pool)
    for pool in pools:
        for peer in pools:
            if peer is not pool:
                file_descriptors = [os.dup(fd) for fd in peer.transport.export()]
                pool.connect(peer.rank, peer.offer(), file_descriptors)
    return pools


class RankLoop(threading.Thread):
    """One rank's steps: enter a layer, compute until its deadline, leave it."""

    def __init__(
        self,
        pool: WeightPool,
        setting: Setting,
        tau: float,
        num_steps: int,
        start: threading.Barrier,
        seed: int,
    ) -> None:
        super().__init__(daemon=True)
        self.pool = pool
        self.setting, self.tau, self.num_steps = setting, tau, num_steps
        self.start_together = start
        self.dice = random.Random(seed)
        self.step_seconds: list[float] = []
        self.late: list[float] = []  # seconds that a sleep took too long: noise of the machine

    def run(self) -> None:
        self.pool.start()
        self.start_together.wait()
        deadline = time.perf_counter()
        for _ in range(self.num_steps):
            began = deadline
            for layer in range(self.setting.num_layers):
                deadline = self._layer(layer, deadline)
            self.step_seconds.append(deadline - began)

    def _layer(self, layer: int, deadline: float) -> float:
        entered = time.perf_counter()
        self.pool.enter(layer)
        ready = time.perf_counter()
        # Waking up late is the machine's delay, not the link's: the next deadline does not move.
        if ready - entered > STALLED * self.tau:
            deadline = max(deadline, ready)
        deadline += self.tau * max(0.0, self.dice.gauss(1.0, self.setting.jitter))
        time.sleep(max(0.0, deadline - time.perf_counter()))
        self.late.append(time.perf_counter() - deadline)
        self.pool.leave(layer)
        return deadline


@dataclass(frozen=True)
class Measured:
    """One run: step time over the ideal, as `StepTime`; `late`: 99th percentile, over τ."""

    all_ranks: float
    slowest_rank: float
    late: float


def measure(setting: Setting, tau: float, warm_up: int, num_steps: int, seed: int) -> Measured:
    pools = connected_pools(setting, tau)
    start = threading.Barrier(setting.num_ranks)
    ranks = [
        RankLoop(pool, setting, tau, warm_up + num_steps, start, seed * 100 + pool.rank)
        for pool in pools
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    for pool in pools:
        pool.close()
        assert pool.prefetcher.counters.resyncs == 0
    ideal = setting.num_layers * tau
    steps = [[seconds / ideal for seconds in rank.step_seconds[warm_up:]] for rank in ranks]
    late = sorted(seconds / tau for rank in ranks for seconds in rank.late)
    return Measured(
        statistics.median(time for times in steps for time in times),
        max(statistics.median(times) for times in steps),
        late[int(0.99 * len(late))],
    )


def measure_quietly(
    setting: Setting, tau: float, warm_up: int, num_steps: int, seed: int
) -> Measured:
    """`measure`, again where something else kept the machine busy."""
    for _ in range(MAX_TRIES):
        result = measure(setting, tau, warm_up, num_steps, seed)
        if result.late < BUSY:
            break
    return result


def modelled(setting: Setting, warm_up: int, num_steps: int, seed: int) -> dict[str, float]:
    """The event model in lock-step, and with noise (median of five seeds)."""
    noisy = replace(
        setting, jitter=max(setting.jitter, NOISE), start_spread=float(setting.num_layers)
    )
    with_noise = [
        relative_step_time(noisy, num_steps, warm_up, seed + n).all_ranks for n in range(5)
    ]
    lockstep = relative_step_time(setting, num_steps, warm_up, seed)
    return {
        "with_noise": statistics.median(with_noise),
        "lockstep": lockstep.all_ranks,
        "lockstep_slowest_rank": lockstep.slowest_rank,
    }


Choice = tuple[str, bool, int]  # order, turns, slots


def good_choices(rows: Iterable[dict[str, Any]]) -> dict[tuple[int, float, float], set[Choice]]:
    """For every (ranks, f/τ, jitter): the choices within the tolerance of the best."""
    groups: dict[tuple[int, float, float], dict[Choice, float]] = {}
    for row in rows:
        group = groups.setdefault((row["num_ranks"], row["fetch"], row["jitter"]), {})
        group[row["order"], row["turns"], row["num_slots"]] = row["measured"]["median"]
    return {
        key: {choice for choice, time in group.items() if time <= min(group.values()) + TOLERANCE}
        for key, group in groups.items()
    }


def best_choices(good: dict[tuple[int, float, float], set[Choice]]) -> list[dict[str, Any]]:
    """All choices, those first that are good in the most settings, then those with fewer slots."""
    choices = set().union(*good.values())
    counts = {choice: sum(choice in group for group in good.values()) for choice in choices}
    ordered = sorted(choices, key=lambda choice: (-counts[choice], choice[2]))
    return [
        {
            "order": order,
            "turns": turns,
            "slots": slots,
            "good_in": counts[order, turns, slots],
            "settings": len(good),
        }
        for order, turns, slots in ordered
    ]


def order_name(row: dict[str, Any]) -> str:
    return "in turns" if row["turns"] else row["order"]


def table(results: dict[str, Any]) -> Table:
    heads = ["d", "f/τ", "jitter", "order", "slots", "measured", "slowest rank", "event model"]
    rows = [
        [
            str(row["num_ranks"]),
            f"{row['fetch']:g}",
            f"{row['jitter']:.0%}",
            order_name(row),
            str(row["num_slots"]),
            ranged(row["measured"]),
            f"{row['measured_slowest_rank']:.2f}",
            f"{row['model']['with_noise']:.2f}",
            f"{row['model']['lockstep']:.2f}",
        ]
        for row in results["rows"]
    ]
    return [*heads, "in lock-step"], rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repeat, fewer steps and settings")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tau-ms", type=float, default=7.0, help="compute of one layer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    repeats, warm_up, num_steps = (1, 2, 3) if args.quick else (args.repeats, 4, 3)
    sys.setswitchinterval(0.0002)  # many threads that do little: hand the interpreter on quickly

    settings = plan(args.layers, args.quick)
    runs: dict[Setting, list[Measured]] = {setting: [] for setting in settings}
    for repeat in range(repeats):  # outermost, so that a busy minute does not hit one setting only
        for index, setting in enumerate(settings):
            print(f"\r{repeat + 1}/{repeats} {index + 1}/{len(settings)} ", end="", file=sys.stderr)
            seed = args.seed + repeat
            runs[setting].append(
                measure_quietly(setting, args.tau_ms / 1000, warm_up, num_steps, seed)
            )
    print(file=sys.stderr)

    rows = [
        {
            **asdict(setting),
            "measured": spread([result.all_ranks for result in results]),
            "measured_slowest_rank": statistics.median(r.slowest_rank for r in results),
            "sleeps_late_p99": max(result.late for result in results),
            "model": modelled(setting, warm_up, num_steps, args.seed),
        }
        for setting, results in runs.items()
    ]
    rows.sort(key=lambda row: (row["num_ranks"], row["fetch"], row["jitter"]))
    good = good_choices(rows)
    best = best_choices(good)
    results = {
        "unit": "step time over the ideal (layers · τ)",
        "seed": args.seed,
        "repeats": repeats,
        "warm_up_steps": warm_up,
        "measured_steps": num_steps,
        "tau_ms": args.tau_ms,
        "block_bytes": BLOCK_BYTES,
        "default": {"order": "sequential", "turns": True, "slots": DEFAULT_SLOTS},
        "tolerance": TOLERANCE,
        "choices": best,
        "rows": rows,
    }
    record("prefetch_order_quick" if args.quick else "prefetch_order", results)
    print(plain(*table(results)))
    print(f"within {TOLERANCE} of the best, by number of settings (all {len(good)} is best):")
    for choice in best[:4]:
        print(f"  {order_name(choice)}, {choice['slots']} slots: {choice['good_in']}")


if __name__ == "__main__":
    main()

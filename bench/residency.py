"""A day in minutes on plain DP and SiDP: load comes, rises, falls and tails off.

Each phase is a job of its own; every side runs it in turn. SiDP is one engine, whose residency is
turned off and on while it runs: off is streaming and sending as the paper has it. Both engines have
SGLang's own dispatcher and the same device memory. The link is paced so that the fetches of a step
take four times the step of a plain rank at batch 1. 10 GB of memory, ten minutes on two cores.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.constant_batch import ENVIRONMENT, KEYWORDS, run_steps
from bench.demo_job import CHECKPOINT, fetched_bytes, link_gbps, make_prompts
from bench.figures import COLOURS, LABELS, figure
from bench.offline import JobResult
from bench.record import over, record, spread
from bench.side import Side, rotated
from bench.tables import Table, plain, ranged

FETCH_OVER_STEP = 4.0  # of one plain rank at batch 1
INPUT_TOKENS = 32
REPEATS = 4
RESIDENCY = {"off": 0, "auto": 1}
SIDES = ["plain", *RESIDENCY]
MODES = ("was", "cas", "local")
LOCAL_SECONDS = 60.0  # for all blocks to come


@dataclass(frozen=True)
class Phase:
    """`lengths(d)`: output tokens of every request. `is_first_token`: what counts is how soon all
    have their first one."""

    lengths: Callable[[int], list[int]]
    is_first_token: bool = False


def _tail(dp_size: int) -> list[int]:
    lengths = np.random.default_rng(0).lognormal(np.log(24.0), 1.0, 12 * dp_size)
    return np.clip(np.rint(lengths), 4, 192).astype(int).tolist()


PHASES = {
    "one request": Phase(lambda d: [96]),
    "a few": Phase(lambda d: [64] * 4 * d),
    "a burst": Phase(lambda d: [1] * 12 * d, is_first_token=True),
    "more than fits": Phase(lambda d: [32] * 40 * d),
    "a long tail": Phase(_tail),
}
HEADS = [
    "phase",
    "tokens/s: plain DP",
    "SiDP, nothing stays",
    "SiDP",
    "nothing stays / plain",
    "SiDP / plain",
    "steps WaS, CaS, local",
    "mean batch",
]


def start(stack: ExitStack, name: str, gbps: float | None, args: argparse.Namespace) -> Side:
    keywords = {
        "model_path": str(CHECKPOINT),
        "dp_size": args.dp_size,
        "skip_tokenizer_init": True,
        **KEYWORDS,
    }
    if gbps is not None:
        keywords |= {"sidp": True, "sidp_link_gbps": gbps, "load_balance_method": "round_robin"}
    environment = {**ENVIRONMENT, "SIDP_CPU_DEVICE_MEMORY": args.device_memory}
    print(f"starting {name}", file=sys.stderr)
    return stack.enter_context(Side(name, environment, keywords))


def statuses(side: Side) -> list[dict[str, Any]]:
    return [state["sidp"] for state in side.states()]


def prepare(side: Side, residency: str) -> None:
    """Turn it; wait until all blocks are where they shall be."""
    side.update(sidp_residency=RESIDENCY[residency])
    deadline = time.monotonic() + LOCAL_SECONDS
    while residency == "auto" and any(is_missing_blocks(s) for s in statuses(side)):
        assert time.monotonic() < deadline, "blocks don't come to stay"
        time.sleep(0.2)


def is_missing_blocks(status: dict[str, Any]) -> bool:
    return status["residency"]["blocks"] < status["residency"]["needed"]


def steps_by_mode(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, int]:
    return {
        mode: sum(
            new["iterations"][mode] - old["iterations"][mode]
            for old, new in zip(before, after, strict=True)
        )
        for mode in MODES
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Phase → side → its runs and SiDP's steps by mode."""
    with ExitStack() as stack:
        plain_side = start(stack, "plain", None, args)
        # The fastest: a step that was disturbed would make the link too slow.
        steps = [run_steps(plain_side, 1, 48, [0], args.seed) for _ in range(6)]
        first_step = min(step.seconds for step in steps)
        gbps = args.link_gbps or link_gbps(args.dp_size, FETCH_OVER_STEP * first_step)
        sidp = start(stack, "SiDP", gbps, args)
        phases = {}
        for name, phase in PHASES.items():
            lengths = phase.lengths(args.dp_size)
            prompts = make_prompts(len(lengths), INPUT_TOKENS, args.seed)
            sampling = [
                {"temperature": 0, "max_new_tokens": n, "ignore_eos": True} for n in lengths
            ]
            runs: dict[str, list[JobResult]] = {side: [] for side in SIDES}
            steps_of = {side: dict.fromkeys(MODES, 0) for side in RESIDENCY}
            for repeat in range(args.repeats):
                for side in rotated(SIDES, repeat):
                    engine = plain_side
                    if side in RESIDENCY:
                        engine = sidp
                        prepare(sidp, side)
                        before = statuses(sidp)
                    result = engine.run(prompts, sampling)
                    runs[side].append(result)
                    if side in RESIDENCY:
                        for mode, number in steps_by_mode(before, statuses(sidp)).items():
                            steps_of[side][mode] += number
                    print(
                        f"{name}, {repeat + 1}/{args.repeats} {side}: {result.seconds:.2f} s",
                        file=sys.stderr,
                    )
            phases[name] = row_of(runs, steps_of)
        kv = {
            "plain": plain_side.states()[0]["memory_usage"]["token_capacity"],
            "sidp": sidp.states()[0]["memory_usage"]["token_capacity"],
        }
        dropped = sum(status["residency"]["dropped"] for status in statuses(sidp))
    assert phases["one request"]["steps"]["auto"]["local"] > 0, "nothing has stayed"
    assert phases["more than fits"]["steps"]["off"]["local"] == 0
    return {
        "link_gbps": gbps,
        "first_step_seconds": first_step,
        "kv_tokens": kv,
        "dropped_blocks": dropped,
        "phases": phases,
    }


def row_of(runs: dict[str, list[JobResult]], steps: dict[str, dict[str, int]]) -> dict[str, Any]:
    speeds = {side: [run.tokens_per_second for run in each] for side, each in runs.items()}
    return {
        "tokens_per_second": {side: spread(values) for side, values in speeds.items()},
        "seconds": {side: spread([run.seconds for run in each]) for side, each in runs.items()},
        "mean_batch": {
            side: statistics.median(run.mean_batch for run in each) for side, each in runs.items()
        },
        "off_over_plain": over(speeds["off"], speeds["plain"]),
        "auto_over_plain": over(speeds["auto"], speeds["plain"]),
        "steps": steps,
        "same_outputs": [
            all(run.outputs == of_a_repeat[0].outputs for run in of_a_repeat)
            for of_a_repeat in zip(*runs.values(), strict=True)
        ],
    }


def shares(steps: dict[str, int]) -> list[float]:
    total = max(1, sum(steps.values()))
    return [steps[mode] / total for mode in MODES]


def table(results: dict[str, Any]) -> Table:
    rows = [
        [
            name + (" (first tokens)" if PHASES[name].is_first_token else ""),
            *(ranged(speed, 0) for speed in row["tokens_per_second"].values()),
            ranged(row["off_over_plain"]),
            ranged(row["auto_over_plain"]),
            ", ".join(f"{share:.0%}" for share in shares(row["steps"]["auto"])),
            " → ".join(f"{row['mean_batch'][side]:.1f}" for side in ("plain", "auto")),
        ]
        for name, row in results["phases"].items()
    ]
    return HEADS, rows


def draw(name: str, results: dict[str, Any]) -> None:
    phases = results["phases"]
    places = np.arange(len(phases))
    with figure(name, 2, 11, 3.6) as (speed, modes):
        for shift, side, label in ((-0.2, "off", "nothing stays"), (0.2, "auto", "SiDP")):
            ratios = [row[f"{side}_over_plain"] for row in phases.values()]
            values = [ratio["median"] for ratio in ratios]
            error = [
                [ratio["median"] - ratio["min"] for ratio in ratios],
                [ratio["max"] - ratio["median"] for ratio in ratios],
            ]
            speed.bar(
                places + shift,
                values,
                0.38,
                yerr=error,
                capsize=3,
                color=COLOURS["was" if side == "off" else "auto"],
                label=label,
            )
        speed.axhline(1.0, color=COLOURS["plain"], linewidth=1)
        speed.set_ylabel("tokens per second over plain DP")
        speed.legend(frameon=False)
        bottom = np.zeros(len(phases))
        for index, mode in enumerate(MODES):
            values = [100 * shares(row["steps"]["auto"])[index] for row in phases.values()]
            modes.bar(places, values, 0.6, bottom, color=COLOURS[mode], label=LABELS[mode])
            bottom += values
        modes.set_ylabel("steps of all ranks (%)")
        modes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
        for axes in (speed, modes):
            axes.set_xticks(places, [phase.replace(" ", "\n", 1) for phase in phases])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dp-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--link-gbps", type=float, help="default: from the step at batch 1")
    parser.add_argument("--device-memory", default="12MB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = {"arguments": vars(args), **measure(args)}
    name = "residency" if args.repeats >= REPEATS else "residency_quick"
    record(name, results)
    draw(name, results)
    fetch = fetched_bytes(args.dp_size) / results["link_gbps"] / 1e6
    print(f"The fetches of a step take {fetch:.1f} ms ({results['link_gbps']:.3f} GB/s per link).")
    print(plain(*table(results)))


if __name__ == "__main__":
    main()

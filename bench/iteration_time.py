"""Time of a decode step over the batch size: plain DP, WaS, CaS and auto, all up in one run.

The link is paced so that the fetches of a step take about five times the step of a plain rank at
batch 1. Every rank runs the same batch; repeats alternate between the sides, each time from another
one on. Before a batch size is measured, each side runs it once uncounted, auto for longer: it
learns. All sides are up at once: 18 GB of memory, twenty minutes on two cores.
"""

import argparse
import statistics
import sys
from contextlib import ExitStack
from typing import Any

from bench.constant_batch import ENVIRONMENT, KEYWORDS, Steps, run_batch, run_steps
from bench.demo_job import CHECKPOINT, fetched_bytes, link_gbps
from bench.figures import LABELS
from bench.iteration_report import crossing, draw, print_table
from bench.record import record, spread
from bench.side import Side

DP_SIZE = 2
SIDES = ["plain", "was", "cas", "auto"]
BATCHES = [1, 2, 4, 8, 16, 32, 48, 64]
REPEATS = 9
FETCH_OVER_STEP = 5.0  # of a plain rank at batch 1
LEARNING_STEPS = 96  # of auto; its threshold follows every 8 steps
WARM_UP_STEPS = 8  # of the others


def keywords(side: str, gbps: float | None) -> dict[str, Any]:
    common = {
        "model_path": str(CHECKPOINT),
        "dp_size": DP_SIZE,
        "skip_tokenizer_init": True,
        **KEYWORDS,
    }
    if side == "plain":
        return common
    return {**common, "sidp": True, "sidp_mode": side, "sidp_link_gbps": gbps}


def run(side: Side, batch: int, args: argparse.Namespace) -> Steps:
    return run_steps(side, batch, args.steps, list(range(DP_SIZE)), args.seed)


def warm_up(name: str, side: Side, batch: int, args: argparse.Namespace) -> None:
    num_steps = LEARNING_STEPS if name == "auto" else WARM_UP_STEPS
    run_batch(side, batch, num_steps, list(range(DP_SIZE)), args.seed)


def check_fetched_bytes(side: Side) -> None:
    for state in side.states():
        status = state["sidp"]
        assert status["pooled_bytes"] - status["owned_bytes"] == fetched_bytes(DP_SIZE)


def rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Batch size → side → its runs, and the link that they had."""
    environment = {**ENVIRONMENT, "SIDP_CPU_DEVICE_MEMORY": args.device_memory}
    gbps, first_step = args.link_gbps, None
    sides: dict[str, Side] = {}
    with ExitStack() as stack:
        for name in args.sides:  # one after another: each calibrates on a quiet machine
            print(f"starting {LABELS[name]}", file=sys.stderr)
            side = Side(LABELS[name], environment, keywords(name, gbps))
            sides[name] = stack.enter_context(side)
            if name == "plain":
                # The fastest: a step that was disturbed would make the link too slow.
                first_step = min(run(side, 1, args).seconds for _ in range(6))
                gbps = gbps or link_gbps(DP_SIZE, FETCH_OVER_STEP * first_step)
            else:
                check_fetched_bytes(side)
        runs: dict[int, dict[str, list[Steps]]] = {}
        for batch in args.batches:
            runs[batch] = {name: [] for name in sides}
            print(f"batch {batch}", file=sys.stderr)
            for name, side in sides.items():
                warm_up(name, side, batch, args)
            for number in range(args.repeats):
                for name in rotated(list(sides), number):
                    runs[batch][name].append(run(sides[name], batch, args))
    return {"link_gbps": gbps, "first_step_seconds": first_step, "runs": runs}


def batch_row(batch: int, runs: dict[str, list[Steps]]) -> dict[str, Any]:
    """What a batch size showed; times in milliseconds."""
    row: dict[str, Any] = {
        "batch": batch,
        "step_ms": {
            name: spread([1e3 * steps.seconds for steps in repeats])
            for name, repeats in runs.items()
        },
    }
    if auto := runs.get("auto"):
        row["auto_cas_share"] = statistics.median(steps.cas_share for steps in auto)
        row["auto_switches"] = sum(steps.switches for steps in auto)
        row["auto_thresholds"] = [steps.thresholds for steps in auto]
    if {"was", "cas", "auto"} <= set(runs):
        better = min(("was", "cas"), key=lambda name: row["step_ms"][name]["median"])
        ratios = [a.seconds / b.seconds for a, b in zip(auto, runs[better], strict=True)]
        row |= {"better": better, "auto_over_better": spread(ratios)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, metavar="B")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a run")
    parser.add_argument("--link-gbps", type=float, help="default: from the step at batch 1")
    parser.add_argument("--device-memory", default="256MB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.sides = [name for name in SIDES if name in args.sides]
    if args.link_gbps is None and "plain" not in args.sides:
        parser.error("the link follows from the plain side: add it, or give --link-gbps")

    result = measure(args)
    rows = [batch_row(batch, runs) for batch, runs in result.pop("runs").items()]
    is_complete = args.sides == SIDES and args.batches == BATCHES and args.repeats >= REPEATS
    name = "iteration_time" if is_complete else "iteration_time_quick"
    result |= {"dp_size": DP_SIZE, "rows": rows, "crossing": crossing(rows)}
    record(name, {"arguments": vars(args), **result})
    draw(name, rows, args.sides)
    fetch = fetched_bytes(DP_SIZE) / result["link_gbps"] / 1e6
    print(
        f"The fetches of a step take {fetch:.1f} ms ({result['link_gbps']:.3f} GB/s per link)",
        end="",
    )
    if args.link_gbps is None:
        print(
            f", for a plain rank's took {1e3 * result['first_step_seconds']:.1f} ms at first",
            end="",
        )
    print(".")
    print_table(rows, args.sides)


if __name__ == "__main__":
    main()

"""Time of a decode step over the batch size: plain DP, and WaS, CaS and auto of one SiDP engine.

Two engines are up in one run, plain SGLang and SiDP. WaS and CaS are the SiDP engine with a batch
threshold that is set while it runs, which teaches auto nothing: two engines of the same mode differ
by more than the modes do where they are close.

The link is paced so that the fetches of a step take about five times the step of a plain rank at
batch 1. Every rank runs the same batch; repeats alternate between the sides, each time from another
one on. Before a batch size is measured, auto runs it uncounted: it learns. Nor are the first steps
after a change of side counted. 9 GB of memory, twenty minutes on two cores.
"""

import argparse
import statistics
import sys
from contextlib import ExitStack
from typing import Any

from bench.constant_batch import ENVIRONMENT, KEYWORDS, Steps, run_batch, run_steps
from bench.demo_job import CHECKPOINT, fetched_bytes, link_gbps
from bench.figures import LABELS
from bench.iteration_report import crossing, draw, summary, table
from bench.record import over, record, spread
from bench.side import Side, rotated
from bench.tables import plain
from sidp_sgl.weightpool.cas.staging import MOST_ROWS

DP_SIZE = 2
SIDES = ["plain", "was", "cas", "auto"]
BATCHES = [1, 2, 4, 8, 16, 32, 48, 64]
REPEATS = 9
FETCH_OVER_STEP = 5.0  # of a plain rank at batch 1
LEARNING_STEPS = 96  # of auto; its threshold follows every 8 steps
WARM_UP_STEPS = 8  # of every run; a change of mode takes four
THRESHOLDS = {"was": 1, "cas": MOST_ROWS + 1, "auto": 0}  # 0: as the ranks measure it


def keywords(gbps: float | None) -> dict[str, Any]:
    """Of the plain engine, where `gbps` is None."""
    return {
        "model_path": str(CHECKPOINT),
        "dp_size": DP_SIZE,
        "skip_tokenizer_init": True,
        **KEYWORDS,
        **({} if gbps is None else {"sidp": True, "sidp_link_gbps": gbps, "sidp_residency": "off"}),
    }


def start(stack: ExitStack, label: str, gbps: float | None, device_memory: str) -> Side:
    environment = {**ENVIRONMENT, "SIDP_CPU_DEVICE_MEMORY": device_memory}
    print(f"starting {label}", file=sys.stderr)
    return stack.enter_context(Side(label, environment, keywords(gbps)))


class Sides:
    """What runs are made on, by name."""

    def __init__(self, plain: Side | None, sidp: Side, args: argparse.Namespace) -> None:
        self._plain = plain
        self._sidp = sidp
        self._args = args

    def _of(self, name: str) -> Side:
        if name == "plain":
            assert self._plain is not None
            return self._plain
        self._sidp.update(sidp_batch_threshold=THRESHOLDS[name])
        return self._sidp

    def run(self, name: str, batch: int) -> Steps:
        side, ranks = self._of(name), list(range(DP_SIZE))
        run_batch(side, batch, WARM_UP_STEPS, ranks, self._args.seed)
        steps = run_steps(side, batch, self._args.steps, ranks, self._args.seed)
        assert steps.cas_steps == 0 or name in ("cas", "auto")
        assert steps.cas_steps > 0 or name != "cas"
        return steps

    def learn(self, batch: int) -> None:
        run_batch(self._of("auto"), batch, LEARNING_STEPS, list(range(DP_SIZE)), self._args.seed)


def check_fetched_bytes(side: Side) -> None:
    for state in side.states():
        status = state["sidp"]
        assert status["pooled_bytes"] - status["owned_bytes"] == fetched_bytes(DP_SIZE)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Batch size → side → its runs, and the link that they had."""
    gbps, first_step = args.link_gbps, None
    with ExitStack() as stack:
        plain = None
        if "plain" in args.sides:
            plain = start(stack, LABELS["plain"], None, args.device_memory)
            # The fastest: a step that was disturbed would make the link too slow.
            steps = [run_steps(plain, 1, args.steps, [0, 1], args.seed) for _ in range(6)]
            first_step = min(step.seconds for step in steps)
            gbps = gbps or link_gbps(DP_SIZE, FETCH_OVER_STEP * first_step)
        sidp = start(stack, "SiDP", gbps, args.device_memory)  # calibrates on a quiet machine
        check_fetched_bytes(sidp)
        sides = Sides(plain, sidp, args)
        runs: dict[int, dict[str, list[Steps]]] = {}
        for batch in args.batches:
            print(f"batch {batch}", file=sys.stderr)
            runs[batch] = {name: [] for name in args.sides}
            if "auto" in args.sides:
                sides.learn(batch)
            for number in range(args.repeats):
                for name in rotated(args.sides, number):
                    runs[batch][name].append(sides.run(name, batch))
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
    row["cas_share"] = {
        name: statistics.median(steps.cas_share for steps in repeats)
        for name, repeats in runs.items()
    }
    if auto := runs.get("auto"):
        row["auto_switches"] = sum(steps.switches for steps in auto)
        row["auto_thresholds"] = [steps.thresholds for steps in auto]
    if {"was", "cas", "auto"} <= set(runs):
        better = min(("was", "cas"), key=lambda name: row["step_ms"][name]["median"])
        ratio = over(*([steps.seconds for steps in runs[name]] for name in ("auto", better)))
        row |= {"better": better, "auto_over_better": ratio}
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
    print(plain(*table(result)))
    print(summary(result))


if __name__ == "__main__":
    main()

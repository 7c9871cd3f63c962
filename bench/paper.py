"""The paper's figures and the model's, side by side: do they agree within a stated band?

Two columns: with our engine's constants (planner/machine.py), and with one assumption about the
paper's testbed, the same for all figures: every step has a fixed time of 50 ms on top.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from bench.figures import COLOURS, figure
from bench.paper_anchors import TAIL, Anchor, anchors, tail, was_share
from bench.paper_jobs import (
    FILLINGS,
    GPUS,
    MACHINES,
    MODELS,
    SEED,
    SEQUENCES,
    TESTBED_STEP_SECONDS,
)
from bench.record import record
from bench.tables import Table, plain

HEADS = {"engine": "our engine", "testbed": "with 50 ms per step"}
MARKS = {"engine": ("o", COLOURS["was"]), "testbed": ("s", COLOURS["cas"])}


def interval(low: float, high: float) -> str:
    texts = [f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in (low, high)]
    return texts[0] if texts[0] == texts[1] else "–".join(texts)


def row(anchor: Anchor) -> dict[str, Any]:
    """Values for every machine, and whether they agree."""
    result: dict[str, Any] = {
        "figure": anchor.figure,
        "what": anchor.what,
        "reported": [anchor.low, anchor.high],
        "band": anchor.band,
        "why": anchor.why,
    }
    for machine in MACHINES:
        started = time.perf_counter()
        values = list(anchor.modelled(machine))
        result[machine] = {
            "values": values,
            "median": median(values),
            "agrees": anchor.agrees(values),
        }
        seconds = time.perf_counter() - started
        print(f"{anchor.figure} {anchor.what}, {machine}: {seconds:.1f} s", file=sys.stderr)
    return result


def anchor_table(results: dict[str, Any]) -> Table:
    heads = ["figure", "what", "reported", "band"]
    for machine in MACHINES:
        heads += [HEADS[machine], "agrees"]
    rows = []
    for anchor in results["anchors"]:
        cells = [anchor["figure"], anchor["what"], interval(*anchor["reported"])]
        cells.append(f"{anchor['band']:.0%}")
        for machine in MACHINES:
            values = anchor[machine]["values"]
            cells.append(interval(min(values), max(values)))
            cells.append("yes" if anchor[machine]["agrees"] else "no")
        rows.append(cells)
    return heads, rows


def reasons(results: dict[str, Any]) -> str:
    """What would explain the rest, once for each figure."""
    why = {anchor["figure"]: anchor["why"] for anchor in results["anchors"]}
    return "\n".join(f"- {figure}: {reason}" for figure, reason in why.items())


JOBS = (  # what the paper leaves open of its job: fillings of all room, prompts' share of S
    (FILLINGS, 0.5),
    (10, 0.5),
    (FILLINGS, 0.125),
    (10, 0.125),
)
JOB_HEADS = ["job of Figs 13 and 15", "constants", "WaS only", "WaS + CaS", "share of WaS"]


def of_jobs() -> list[dict[str, Any]]:
    """Figs 13 and 15 again, for other jobs."""
    rows = []
    for fillings, prompts in JOBS:
        for machine in MACHINES:
            case = replace(TAIL, machine=machine, fillings=fillings, prompt_share=prompts)
            values = {"was": tail(case, "was"), "auto": tail(case, "auto")}
            rows.append(
                {"fillings": fillings, "prompt_share": prompts, "machine": machine, **values}
                | {"was_share": was_share(case)}
            )
    return rows


def job_table(results: dict[str, Any]) -> Table:
    rows = [
        [
            f"room filled {row['fillings']} times, prompts {row['prompt_share']:g} S",
            HEADS[row["machine"]],
            *(f"{row[key]:.2f}" for key in ("was", "auto", "was_share")),
        ]
        for row in results["jobs"]
    ]
    return JOB_HEADS, rows


def draw(name: str, results: Sequence[dict[str, Any]]) -> None:
    """Modelled over reported, on a logarithmic axis."""
    with figure(name, 1, 9, 0.24 * len(results) + 1.2) as (axes,):
        for index, result in enumerate(results):
            low, high = result["reported"]
            middle = (low + high) / 2
            y = len(results) - index
            ends = [max(low, 1e-9) * (1 - result["band"]), high * (1 + result["band"])]
            axes.plot([max(0.2, end / middle) for end in ends], [y, y], color="#bbbbbb", lw=7)
            for machine, (marker, colour) in MARKS.items():
                values = [value / middle for value in result[machine]["values"]]
                label = HEADS[machine] if index == 0 else None
                axes.plot(values, [y] * len(values), marker, color=colour, ms=5, label=label)
        axes.set_yticks(
            range(len(results), 0, -1), [f"{r['figure']}: {r['what']}" for r in results], fontsize=7
        )
        axes.set_xscale("log", base=2)
        ticks = [0.25, 0.5, 0.75, 1, 1.5, 2]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel("modelled over reported; grey: reported, with its band")
        axes.legend(frameon=False, loc="upper left", fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="of Figs 6 to 8 only H20")
    args = parser.parse_args()
    name = "paper_quick" if args.quick else "paper"
    results = {
        "arguments": vars(args),
        "models": MODELS,
        "sequences": SEQUENCES,
        "fillings": FILLINGS,
        "seed": SEED,
        "repeats": 1,
        "testbed_step_seconds": TESTBED_STEP_SECONDS,
        "anchors": [row(anchor) for anchor in anchors(GPUS[:1] if args.quick else GPUS)],
        "jobs": of_jobs(),
    }
    record(name, results)
    print(plain(*anchor_table(results)))
    print(plain(*job_table(results)))
    print(reasons(results))
    if not args.quick:
        draw(name, results["anchors"])


if __name__ == "__main__":
    main()

"""What bench.iteration_time says of its rows: the table, where the modes cross, the figure."""

from itertools import pairwise
from typing import Any

from bench.figures import COLOURS, LABELS, figure
from bench.record import spread
from bench.tables import Table, ranged

TOLERANCE = 1.1  # auto over the better mode


def crossing(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Where WaS last becomes the faster mode, on the lines between the medians, and auto's
    thresholds after the runs of the two batch sizes beside it. None where the lines do not cross,
    or one of the modes was not measured."""
    for left, right in reversed(list(pairwise(rows))):
        if "better" not in left:
            return None
        if left["better"] == "cas" and right["better"] == "was":
            behind, ahead = (
                row["step_ms"]["was"]["median"] - row["step_ms"]["cas"]["median"]
                for row in (left, right)
            )
            part = behind / (behind - ahead)
            learnt = [t for row in (left, right) for each in row["auto_thresholds"] for t in each]
            return {
                "batch": left["batch"] + part * (right["batch"] - left["batch"]),
                "thresholds": spread([t for t in learnt if t is not None]),
            }
    return None


def table(results: dict[str, Any]) -> Table:
    sides = list(results["rows"][0]["step_ms"])
    heads = ["batch per rank", *(f"{LABELS[side]} (ms)" for side in sides)]
    heads += ["auto over the better", "auto's steps in CaS", "auto's threshold"]
    rows = []
    for row in results["rows"]:
        learnt = [t for each in row.get("auto_thresholds", []) for t in each if t is not None]
        rows.append(
            [
                str(row["batch"]),
                *(f"{row['step_ms'][side]['median']:.1f}" for side in sides),
                ranged(row["auto_over_better"]) if "auto_over_better" in row else "",
                f"{row['cas_share']['auto']:.0%}" if "auto" in sides else "",
                f"{min(learnt)} to {max(learnt)}" if learnt else "",
            ]
        )
    return heads, rows


def summary(results: dict[str, Any]) -> str:
    """Where auto is behind, and where the modes cross; nothing where they were not all measured."""
    rows = results["rows"]
    if "better" not in rows[0]:
        return ""
    late = [str(row["batch"]) for row in rows if row["auto_over_better"]["median"] > TOLERANCE]
    text = f"Auto is more than {TOLERANCE - 1:.0%} above the better mode at batch "
    text += f"{', '.join(late) or 'none'}. "
    found = results["crossing"]
    if found is None:
        return text + "WaS and CaS do not cross."
    return text + (
        f"WaS and CaS cross at batch {found['batch']:.0f}; auto's threshold beside it is "
        f"{ranged(found['thresholds'], 0)}."
    )


def draw(name: str, rows: list[dict[str, Any]], sides: list[str]) -> None:
    with figure(name, 1, 6.5, 4) as (axes,):
        batches = [row["batch"] for row in rows]
        for side in sides:
            times = [row["step_ms"][side] for row in rows]
            axes.plot(
                batches,
                [time["median"] for time in times],
                marker="o",
                label=LABELS[side],
                color=COLOURS[side],
                linestyle="--" if side == "auto" else "-",
            )
            low, high = ([time[end] for time in times] for end in ("min", "max"))
            axes.fill_between(batches, low, high, color=COLOURS[side], alpha=0.15, linewidth=0)
        if found := crossing(rows):
            middle = found["thresholds"]["median"]
            axes.axvline(middle, color=COLOURS["auto"], alpha=0.5, label="auto's threshold")
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("batch per rank")
        axes.set_ylabel("decode step (ms)")
        axes.legend(frameon=False)

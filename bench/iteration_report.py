"""What bench.iteration_time says of its rows: the table, where the modes cross, the figure."""

from itertools import pairwise
from typing import Any

from bench.figures import COLOURS, LABELS, figure
from bench.record import spread

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


def print_table(rows: list[dict[str, Any]], names: list[str]) -> None:
    print(f"{'B':>3} " + " ".join(f"{LABELS[name] + ', ms':>20}" for name in names), end="")
    print("  auto over the better    CaS steps  switches  threshold")
    for row in rows:
        cells = (
            f"{s['median']:.1f} ({s['min']:.1f}–{s['max']:.1f})" for s in row["step_ms"].values()
        )
        print(f"{row['batch']:>3} " + " ".join(f"{cell:>20}" for cell in cells), end="")
        if ratio := row.get("auto_over_better"):
            text = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"
            print(f"  {LABELS[row['better']]:>3} {text:>17}", end="")
        else:
            print(f"  {'':>21}", end="")
        if "auto_thresholds" in row:
            thresholds = [t for each in row["auto_thresholds"] for t in each if t is not None]
            known = f"{min(thresholds)} to {max(thresholds)}" if thresholds else "unknown"
            print(
                f" {row['cas_share']['auto']:>12.0%} {row['auto_switches']:>9}  {known:>9}", end=""
            )
        print()
    if "better" in rows[0]:
        late = [str(r["batch"]) for r in rows if r["auto_over_better"]["median"] > TOLERANCE]
        print(f"Auto is more than {TOLERANCE - 1:.0%} above the better mode at batch", end=" ")
        print(f"{', '.join(late) or 'none'}.", end=" ")
        if found := crossing(rows):
            print(f"WaS and CaS cross at batch {found['batch']:.0f}; auto's threshold", end=" ")
            print("beside it is {median:g} ({min} to {max}).".format(**found["thresholds"]))
        else:
            print("WaS and CaS do not cross.")


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

"""A plan as a figure: step times over the batch size, and the throughput of every setting.

Needs matplotlib, which a plan without `--plot` does not.
"""

from pathlib import Path
from typing import Any

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.planner.plan.comparison import Plan

_COLOURS = {"plain": "#444444", "fetch": "#999999", "was": "#1f77b4", "cas": "#d62728"}


def draw(plan: Plan, path: Path) -> None:
    """Write `path`; raises SidpUsageError where that is impossible."""
    try:
        import matplotlib
    except ImportError as error:
        raise SidpUsageError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    try:
        _steps(axes[0], plan)
        _throughput(axes[1], plan)
        drawing.suptitle(
            f"{plan.node.shape.name}, {plan.node.num_gpus} x {plan.node.machine.name}, "
            f"{plan.workload.input_len} + {plan.workload.output_len} tokens"
        )
        drawing.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise SidpUsageError(
            f"--plot {path} can't be written ({error}): name a .png file in a folder that exists"
        ) from error
    finally:
        pyplot.close(drawing)


def _steps(axes: Any, plan: Plan) -> None:
    axes.set_title(plan.sidp.deployment.label if plan.sidp else "no SiDP setting fits")
    axes.set_xlabel("batch per rank")
    axes.set_ylabel("decode step (ms)")
    batches = [row.batch for row in plan.steps]
    for name, label in (
        ("plain", "all local"),
        ("fetch", "fetches"),
        ("was", "WaS"),
        ("cas", "CaS"),
    ):
        times = [1e3 * getattr(row, f"{name}_seconds") for row in plan.steps]
        style = "--" if name == "fetch" else "-"
        axes.plot(batches, times, style, color=_COLOURS[name], label=label)
    axes.grid(alpha=0.3)
    if batches:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.legend()


def _throughput(axes: Any, plan: Plan) -> None:
    fitting = [estimate for estimate in plan.estimates if estimate.fits][::-1]
    colours = [_COLOURS["was" if e.is_sidp else "fetch"] for e in fitting]
    labels = [e.deployment.label for e in fitting]
    axes.barh(labels, [e.tokens_per_second for e in fitting], color=colours)
    axes.set_xlabel("output tokens per second, the node")
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.3, axis="x")

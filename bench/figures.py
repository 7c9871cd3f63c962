"""Figures of the benches, alike in style: docs/figures/NAME.png."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
COLOURS = {
    "plain": "#444444",
    "was": "#1f77b4",
    "cas": "#d62728",
    "auto": "#2ca02c",
    "local": "#ff7f0e",
}
LABELS = {"plain": "plain DP", "was": "WaS", "cas": "CaS", "auto": "auto", "local": "local"}


@contextmanager
def figure(name: str, num_axes: int, width: float, height: float) -> Iterator[list[Axes]]:
    """Axes side by side, to be drawn on; inches. Saved on leaving."""
    drawing, axes = pyplot.subplots(1, num_axes, figsize=(width, height), layout="constrained")
    axes = [axes] if num_axes == 1 else list(axes)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.3)
    try:
        yield axes
        FIGURES.mkdir(exist_ok=True)
        drawing.savefig(FIGURES / f"{name}.png", dpi=150)
    finally:
        pyplot.close(drawing)

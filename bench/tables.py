"""Tables of results, for the terminal and for docs/benchmarks.md."""

from collections.abc import Mapping, Sequence

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # heads, rows of cells


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def plain(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """For the terminal: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    )


def ranged(values: Mapping[str, float], decimals: int = 2) -> str:
    """Median (minimum to maximum) of a `record.spread`."""
    middle, low, high = (f"{values[key]:.{decimals}f}" for key in ("median", "min", "max"))
    return f"{middle} ({low} to {high})"

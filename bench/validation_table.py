"""What the model said beside what was measured: rows, table, summary of bench/validate_model."""

import dataclasses
import statistics
from typing import Any

from bench.figures import LABELS
from bench.tables import Table

BAND = 0.2  # relative error


@dataclasses.dataclass(frozen=True)
class Row:
    """One prediction; step times in milliseconds, throughput in tokens per second."""

    ranks: int
    what: str
    side: str
    batch: int | None
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def agrees(self) -> bool:
        return abs(self.error) <= BAND


def rows_of(results: dict[str, Any]) -> list[Row]:
    names = [field.name for field in dataclasses.fields(Row)]
    rows = (row for group in results["groups"] for row in group["rows"])
    return [Row(**{name: row[name] for name in names}) for row in rows]


def table(results: dict[str, Any]) -> Table:
    heads = ["d", "what", "engine", "batch", "predicted", "measured", "error", "in the band"]
    cells = [
        [
            str(row.ranks),
            row.what,
            LABELS[row.side],
            str(row.batch or ""),
            f"{row.predicted:,.1f}",
            f"{row.measured:,.1f}",
            f"{row.error:+.0%}",
            "yes" if row.agrees else "no",
        ]
        for row in rows_of(results)
    ]
    return heads, cells


def summary(results: dict[str, Any]) -> str:
    """How many rows are in the band, and how far the calibrations before and after lie apart."""
    rows = rows_of(results)
    inside = sum(row.agrees for row in rows)
    errors = sorted(abs(row.error) for row in rows)
    drift = max(group["drift"] for group in results["groups"])
    return (
        f"{inside} of {len(rows)} within {BAND:.0%}; median error {statistics.median(errors):.0%}, "
        f"largest {errors[-1]:.0%}. Between the calibrations before and after, the machine's own "
        f"speed moved by up to {drift:.0%}."
    )

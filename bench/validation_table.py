"""What the model said beside what was measured: rows, table, summary of bench/validate_model."""

import dataclasses
import statistics

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


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    heads = ["d", "what", "engine", "batch", "predicted", "measured", "error", "in the band"]
    names = {"plain": "plain DP", "was": "WaS", "cas": "CaS", "auto": "auto"}
    cells = [
        [
            str(row.ranks),
            row.what,
            names[row.side],
            str(row.batch or ""),
            f"{row.predicted:,.1f}",
            f"{row.measured:,.1f}",
            f"{row.error:+.0%}",
            "yes" if row.agrees else "no",
        ]
        for row in rows
    ]
    return heads, cells


def summary(rows: list[Row], drift: float) -> str:
    """`drift`: how far the calibrations before and after lie apart, relative."""
    inside = sum(row.agrees for row in rows)
    errors = sorted(abs(row.error) for row in rows)
    return (
        f"{inside} of {len(rows)} within {BAND:.0%}; median error {statistics.median(errors):.0%}, "
        f"largest {errors[-1]:.0%}. Between the calibrations before and after, the machine's own "
        f"speed moved by up to {drift:.0%}."
    )

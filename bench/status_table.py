"""The table of docs/metrics.md, made anew from `Status`: python -m bench.status_table."""

from pathlib import Path

from bench.tables import markdown
from sidp_sgl.scheduler.status import VALUES, Value

PAGE = Path(__file__).parents[1] / "docs/metrics.md"
BEGIN, END = "<!-- status -->\n", "\n<!-- /status -->"


def table() -> str:
    rows = [
        [
            f"`{'.'.join(value.path)}`",
            f"`{value.series}{_labels(value)}`" if value.about.kind else "",
            value.about.meaning.rstrip("."),
        ]
        for value in VALUES
    ]
    return markdown(["in `/server_info`, under `sidp`", "series", "meaning"], rows)


def _labels(value: Value) -> str:
    labels = ",".join(f'{name}="{label}"' for name, label in value.labels.items())
    return f"{{{labels}}}" if labels else ""


if __name__ == "__main__":
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(head + BEGIN + table() + END + rest.partition(END)[2])

"""Tables that benches write into docs: the text between two marks is theirs."""

from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


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


def put_into(page: str, name: str, text: str) -> None:
    """Replace what stands between the marks `<!-- NAME -->` and `<!-- /NAME -->` of docs/PAGE.

    Raises ValueError where a mark is missing."""
    path = DOCS / page
    content = path.read_text()
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"docs/{page} needs the marks of {name} once each")
    head, rest = content.split(begin)
    path.write_text(head + begin + text.strip() + "\n" + end + rest.split(end)[1])

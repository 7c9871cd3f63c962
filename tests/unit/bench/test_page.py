"""docs/benchmarks.md is what its command makes of the results that are committed."""

import json

from bench import page
from bench.record import RESULTS


def test_the_page_is_made_of_the_results() -> None:
    assert page.PAGE.read_text() == page.page(), "run python -m bench.page"


def test_every_result_has_its_section() -> None:
    paths = [path for path in RESULTS.glob("*.json") if not path.stem.endswith("_quick")]
    names = {json.loads(path.read_text())["bench"] for path in paths}
    assert names <= {section.name for section in page.SECTIONS}


def test_rows_are_as_long_as_their_heads() -> None:
    for section in page.SECTIONS:
        path = RESULTS / f"{section.name}.json"
        if path.exists():
            for table in section.tables:
                heads, rows = table(json.loads(path.read_text())["results"])
                assert rows and {len(row) for row in rows} == {len(heads)}, section.name

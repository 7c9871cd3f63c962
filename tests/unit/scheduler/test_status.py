"""A rank's status: the numbers and the log line that follow from it, the page."""

from pathlib import Path

from bench.status_table import table
from sidp_sgl.scheduler.status import (
    METRICS,
    PREFIX,
    VALUES,
    LogLine,
)
from tests.support.statuses import status_dict

ROOT = Path(__file__).parents[3]


def test_every_value_has_a_meaning_and_every_series_a_name() -> None:
    assert all(value.about.meaning.endswith(".") for value in VALUES)
    series = [(metric.series, *metric.labels.items()) for metric in METRICS]
    assert len(set(series)) == len(METRICS)


def test_numbers_come_from_the_dictionary() -> None:
    status = status_dict(mode="cas", owned_layers=[1, 3], was={"bytes": 7}, iterations={"cas": 4})
    numbers = {(value.series, *value.labels.values()): value.number(status) for value in METRICS}
    assert numbers[PREFIX + "mode",] == 1
    assert numbers[PREFIX + "owned_layers",] == 2
    assert numbers[PREFIX + "batch_threshold",] is None, "not known yet"
    assert numbers[PREFIX + "was_bytes_total",] == 7
    assert numbers[PREFIX + "iterations_total", "cas"] == 4
    assert numbers[PREFIX + "iterations_total", "was"] == 0


def test_the_log_line_tells_what_has_come_since_the_last_one() -> None:
    line = LogLine()
    was = {"bytes": 2_000_000, "stall_seconds": 0.001}
    assert line.text(status_dict(was=was)) == "sidp: was, fetched 2.0 MB, stalled 1.0 ms"
    was = {"bytes": 5_000_000, "stall_seconds": 0.0015}
    assert line.text(status_dict(was=was)) == "sidp: was, fetched 3.0 MB, stalled 0.5 ms"


def test_the_log_line_tells_of_cas_where_there_was_some() -> None:
    line, nothing = LogLine(), "fetched 0.0 MB, stalled 0.0 ms"
    assert line.text(status_dict(mode="cas")) == f"sidp: cas, {nothing}"
    steps, cas = {"cas": 40}, {"rows_sent": 640, "wait_seconds": 0.0123}
    assert line.text(status_dict(mode="cas", iterations=steps, cas=cas)) == (
        f"sidp: cas, {nothing}, 40 CaS steps, sent 640 rows, waited 12.3 ms"
    )
    steps, cas = {"cas": 43}, {"rows_sent": 670, "wait_seconds": 0.0133, "rows_served": 9}
    assert line.text(status_dict(mode="cas", iterations=steps, cas=cas)) == (
        f"sidp: cas, {nothing}, 3 CaS steps, sent 30 rows, waited 1.0 ms, served 9 rows"
    )
    cas["rows_served"] = 12
    assert line.text(status_dict(iterations=steps, cas=cas)) == (
        f"sidp: was, {nothing}, served 3 rows"
    )


def test_the_page_has_the_table_as_it_is_now() -> None:
    assert table() in (ROOT / "docs/metrics.md").read_text(), "python -m bench.status_table"

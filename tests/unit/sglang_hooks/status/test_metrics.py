"""Metrics: where their values come from, counters that only grow, the dashboard's queries."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from sidp_sgl.scheduler.metrics import COUNTER, METRICS, PREFIX, value_of
from sidp_sgl.sglang_hooks.status.metrics import MetricsHooks

ROOT = Path(__file__).parents[4]
DASHBOARD = ROOT / "examples" / "monitoring" / "sidp-dashboard.json"
LABELS = {"model_name": "test_metrics", "dp_rank": 1}


def status(**was: Any) -> dict[str, Any]:
    return {"mode": "cas", "batch_threshold": None, "owned_layers": [1, 3], "was": was}


@pytest.fixture
def hooks():
    made = MetricsHooks(lambda _: {})
    yield made
    for family in made._families.values():
        REGISTRY.unregister(family)


def sample(name: str, **labels: Any) -> float | None:
    texts = {key: str(value) for key, value in {**LABELS, **labels}.items()}
    return REGISTRY.get_sample_value(PREFIX + name, texts)


def test_every_series_has_its_own_name_and_a_meaning() -> None:
    series = [(metric.series, metric.labels) for metric in METRICS]
    assert len(set(series)) == len(METRICS)
    assert all(metric.meaning.endswith(".") for metric in METRICS)


def test_values_come_from_the_status() -> None:
    values = {metric.name.removeprefix(PREFIX): value_of(metric, status()) for metric in METRICS}
    assert values["mode"] == 1 and values["owned_layers"] == 2
    assert values["batch_threshold"] is None, "not known yet"
    assert values["cas_calls"] is None, "no compute service"


def test_counters_move_by_what_came_since(hooks: MetricsHooks) -> None:
    for number in (5, 5, 12):
        hooks.publish(status(fetches=number), LABELS)
        assert sample("was_fetches_total") == number
    assert sample("owned_layers") == 2
    assert sample("batch_threshold") is None


def test_steps_carry_their_mode(hooks: MetricsHooks) -> None:
    hooks.publish({**status(), "iterations": {"was": 3, "cas": 4}}, LABELS)
    assert sample("iterations_total", mode="was") == 3
    assert sample("iterations_total", mode="cas") == 4


def test_dashboard_shows_metrics_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = set(re.findall(r"sglang:sidp_\w+", " ".join(queries)))
    series = {metric.series: metric.kind for metric in METRICS}
    assert used and used <= series.keys()
    for query in queries:  # a counter's rate, a gauge's value
        rated = set(re.findall(r"(?:rate|increase)\((sglang:sidp_\w+)", query))
        counters = {n for n in re.findall(r"sglang:sidp_\w+", query) if series[n] == COUNTER}
        assert rated == counters, query


def test_metrics_are_documented() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    for metric in METRICS:
        assert f"`{metric.series}`" in page and metric.meaning.rstrip(".") in page, metric.series

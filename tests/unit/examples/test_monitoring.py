"""The dashboard's queries and Prometheus's configurations, against what a scrape brings.

In OpenMetrics prometheus_client writes `sglang_…` for `sglang:…`, but not for all who ask.
"""

import re
from collections.abc import Iterator

import pytest
import yaml
from prometheus_client import REGISTRY, Gauge
from prometheus_client.exposition import choose_encoder

from sidp_sgl.scheduler.status import COUNTER, METRICS
from sidp_sgl.sglang_hooks.status.metrics import Metrics
from tests.support.dashboard import (
    ACCEPT,
    MONITORING,
    QUERIES,
    VARIABLES,
    Selector,
    exposed,
    selectors,
    selects,
)
from tests.support.statuses import make_status, status_dict

LABELS = {"model_name": "test_monitoring", "dp_rank": 0}
SGLANGS = ["sglang:gen_throughput", "sglang:cache_hit_rate"]
UNDERSCORES = "whatever prometheus_client does, names in underscores"


@pytest.fixture(scope="module")
def scraped() -> Iterator[dict[str, str]]:
    """By who asks: what `/metrics` answers."""
    metrics = Metrics(make_status)
    metrics.publish(status_dict(batch_threshold=8), LABELS)
    gauges = [Gauge(name, "SGLang's own", list(LABELS)) for name in SGLANGS]
    for gauge in gauges:
        gauge.labels(**LABELS).set(1)
    made = {asks: choose_encoder(accept)[0](REGISTRY).decode() for asks, accept in ACCEPT.items()}
    yield {**made, UNDERSCORES: made["3.5"].replace("sglang:", "sglang_")}
    for family in [*metrics._families.values(), *gauges]:
        REGISTRY.unregister(family)


def names(exposition: str) -> set[str]:
    return {series.name for series in exposed(exposition) if series.name.startswith("sglang")}


@pytest.mark.parametrize("asks", [*ACCEPT, UNDERSCORES])
def test_every_query_finds_its_series(scraped: dict[str, str], asks: str) -> None:
    series = exposed(scraped[asks])
    for query in [*QUERIES, *VARIABLES]:
        asked = selectors(query)
        found = [selector for selector in asked if any(selects(selector, s) for s in series)]
        assert found and names_of(found) == names_of(asked), query


def names_of(selectors: list[Selector]) -> set[str]:
    """In either spelling the same."""
    return {re.sub(r"^sglang(:|_|\[:_\])", "", selector["__name__"]) for selector in selectors}


def test_one_spelling_stands_in_for_the_other() -> None:
    """`this or that`, for with one pattern for both names a range in which a series has changed its
    name is an error to Prometheus: `vector cannot contain metrics with the same labelset`."""
    one = r"(?:(?:rate|increase)\()?sglang:\w+\{[^}]*\}(?:\[[^]]*\]\))?"
    for query in QUERIES:
        parts = re.findall(one, query)
        assert parts
        for part in parts:
            assert f"{part} or {part.replace('sglang:', 'sglang_')}" in query


def test_the_dashboard_shows_metrics_that_exist() -> None:
    kinds = {metric.series: metric.about.kind for metric in METRICS}
    used = set(re.findall(r"sglang:\w+", " ".join(QUERIES)))
    assert used <= {*kinds, *SGLANGS}
    for query in QUERIES:  # a counter's rate, a gauge's value
        rated = set(re.findall(r"(?:rate|increase)\((sglang:\w+)", query))
        counters = {n for n in re.findall(r"sglang:\w+", query) if kinds.get(n) == COUNTER}
        assert rated == counters, query


def configuration(name: str) -> dict:
    (scraping,) = yaml.safe_load((MONITORING / name).read_text())["scrape_configs"]
    return scraping


@pytest.mark.parametrize("asks", ["2.42", "2.53", "3.5"])
def test_the_configuration_for_all_gives_series_their_names(
    scraped: dict[str, str], asks: str
) -> None:
    (rule,) = configuration("prometheus.yaml").pop("metric_relabel_configs")
    assert rule["source_labels"] == ["__name__"] and rule["target_label"] == "__name__"
    pattern, name = f"^(?:{rule['regex']})$", rule["replacement"].replace("$1", r"\1")
    renamed = {re.sub(pattern, name, before) for before in names(scraped[asks])}
    assert {metric.series for metric in METRICS} <= renamed
    assert renamed <= names(scraped["3.5"])


def test_the_configuration_for_2_49_asks_for_the_text_format(scraped: dict[str, str]) -> None:
    newer, any_version = configuration("prometheus-2.49.yaml"), configuration("prometheus.yaml")
    assert newer.pop("scrape_protocols") == ["PrometheusText0.0.4"]
    del any_version["metric_relabel_configs"]
    assert newer == any_version
    for asks in ("2.53 with scrape_protocols", "3.5 with scrape_protocols"):
        assert {metric.series for metric in METRICS} <= names(scraped[asks])

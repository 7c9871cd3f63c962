"""The Grafana dashboard's queries, and which series of an exposition they select."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

MONITORING = Path(__file__).parents[2] / "examples/monitoring"
_DASHBOARD = json.loads((MONITORING / "sidp-dashboard.json").read_text())
QUERIES = [target["expr"] for panel in _DASHBOARD["panels"] for target in panel["targets"]]
VARIABLES = [v["query"] for v in _DASHBOARD["templating"]["list"] if v["type"] == "query"]
ALL = ".*"  # Grafana's value of $model_name for all models

# What Prometheus asks for, by release.
ACCEPT = {
    "2.42": "application/openmetrics-text;version=1.0.0,"
    "application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "2.53": "application/openmetrics-text;version=1.0.0;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "3.5": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "3.5 with metric_name_escaping_scheme: underscores": "application/openmetrics-text;"
    "version=1.0.0;escaping=underscores;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=underscores;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "2.53 with scrape_protocols": "text/plain;version=0.0.4;q=0.5,*/*;q=0.4",
    "3.5 with scrape_protocols": "text/plain;version=0.0.4;q=0.6,*/*;q=0.5",
}


class Series(NamedTuple):
    name: str
    labels: Mapping[str, str]


Selector = Mapping[str, str]  # label, or __name__ → the pattern that its whole value matches


def selectors(query: str) -> list[Selector]:
    found = []
    for name, matchers in re.findall(r"([a-z_:]*)\{([^}]*)\}", query.replace("$model_name", ALL)):
        patterns = re.findall(r'(\w+)=~"([^"]*)"', matchers)
        found.append(dict([("__name__", name)] * bool(name) + patterns))
    return found


def selects(selector: Selector, series: Series) -> bool:
    values = {"__name__": series.name, **series.labels}
    return all(re.fullmatch(pattern, values.get(name, "")) for name, pattern in selector.items())


def exposed(exposition: str) -> list[Series]:
    """What a scrape brings, in the text format or OpenMetrics."""
    lines = re.findall(r"^([\w:]+)(?:\{(.*)\})? ", exposition, re.MULTILINE)
    return [Series(name, dict(re.findall(r'(\w+)="([^"]*)"', labels))) for name, labels in lines]

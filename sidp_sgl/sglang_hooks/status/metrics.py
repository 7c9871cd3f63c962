"""Publishes a rank's status beside SGLang's own metrics, with --enable-metrics."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sidp_sgl.scheduler.status import COUNTER, METRICS, Status, Value

_SECONDS = 1.0


class Metrics:
    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status
        self._published_at = 0.0
        self._families: dict[str, Any] = {}  # by name
        self._counted: dict[Value, float] = {}

    def publish_each_second(self, labels: dict[str, Any]) -> None:
        """`labels`: those of SGLang's metrics of the same scheduler."""
        now = time.monotonic()
        if now - self._published_at >= _SECONDS:
            self._published_at = now
            self.publish(asdict(self._status()), labels)

    def publish(self, status: dict[str, Any], labels: dict[str, Any]) -> None:
        """Set every gauge, and move every counter by what came since the last time."""
        for metric in METRICS:
            number = metric.number(status)
            if number is None:
                continue
            series = self._family(metric, labels).labels(**labels, **metric.labels)
            if metric.about.kind == COUNTER:
                series.inc(max(number - self._counted.get(metric, 0.0), 0.0))
                self._counted[metric] = number
            else:
                series.set(number)

    def _family(self, metric: Value, labels: dict[str, Any]) -> Any:
        name = metric.metric
        if name not in self._families:
            # Not above: SGLang sets PROMETHEUS_MULTIPROC_DIR before anything may import it.
            from prometheus_client import Counter, Gauge

            names = [*labels, *metric.labels]
            if metric.about.kind == COUNTER:
                family: Any = Counter(name, metric.about.meaning, names)
            else:
                family = Gauge(name, metric.about.meaning, names, multiprocess_mode="mostrecent")
            self._families[name] = family
        return self._families[name]

"""Publishes a rank's `sidp` figures beside SGLang's own metrics, with --enable-metrics.

Room: sglang_hooks. Once a second in the scheduler's loop, also when the rank is idle: an idle owner
serves rows. Labels are those of SGLang's metrics of the same scheduler.
"""

import time
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_observability

from sidp_sgl.scheduler.metrics import COUNTER, METRICS, value_of
from sidp_sgl.sglang_hooks.required import Hook

_SECONDS = 1.0


class MetricsHooks:
    """`status_of(scheduler)` gives the `sidp` dictionary."""

    def __init__(self, status_of: Callable[[Any], dict[str, Any]]) -> None:
        self._status_of = status_of
        self._published_at = 0.0
        self._families: dict[str, Any] = {}  # by name
        self._counted: dict[str, float] = {}  # by path

    def hooks(self) -> list[Hook]:
        if not get_observability().enable_metrics:
            return []
        scheduler = "sglang.srt.managers.scheduler.Scheduler"
        return [Hook(f"{scheduler}.ingest_requests", self._after_ingest, HookType.AFTER)]

    def _after_ingest(self, result: Any, scheduler: Any, *_: Any, **__: Any) -> Any:
        now = time.monotonic()
        if now - self._published_at >= _SECONDS:
            self._published_at = now
            self.publish(self._status_of(scheduler), scheduler.metrics_collector.labels)
        return result

    def publish(self, status: dict[str, Any], labels: dict[str, Any]) -> None:
        """Set every gauge, and move every counter by what came since the last time."""
        for metric in METRICS:
            value = value_of(metric, status)
            if value is None:
                continue
            series = self._family(metric, labels).labels(**labels, **dict(metric.labels))
            if metric.kind == COUNTER:
                key = ".".join(metric.path)
                series.inc(max(value - self._counted.get(key, 0.0), 0.0))
                self._counted[key] = value
            else:
                series.set(value)

    def _family(self, metric: Any, labels: dict[str, Any]) -> Any:
        if metric.name not in self._families:
            # Not above: SGLang sets PROMETHEUS_MULTIPROC_DIR before anything may import it.
            from prometheus_client import Counter, Gauge

            names = [*labels, *dict(metric.labels)]
            if metric.kind == COUNTER:
                family: Any = Counter(metric.name, metric.meaning, names)
            else:
                family = Gauge(metric.name, metric.meaning, names, multiprocess_mode="mostrecent")
            self._families[metric.name] = family
        return self._families[metric.name]

"""Metrics in prometheus_client's registry: counters only grow, steps carry their mode."""

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import REGISTRY

from sidp_sgl.scheduler.status import PREFIX
from sidp_sgl.sglang_hooks.status import metrics as metrics_module
from sidp_sgl.sglang_hooks.status.metrics import Metrics
from tests.support.statuses import make_status, status_dict

LABELS = {"model_name": "test_metrics", "dp_rank": 1}


class Now:
    seconds = 100.0
    asked = 0

    def monotonic(self) -> float:
        return self.seconds

    def status(self) -> Any:
        self.asked += 1
        return make_status(cache_slots=self.asked)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    made = Now()
    monkeypatch.setattr(metrics_module, "time", made)
    return made


@pytest.fixture
def metrics(now: Now) -> Iterator[Metrics]:
    made = Metrics(now.status)
    yield made
    for family in made._families.values():
        REGISTRY.unregister(family)


def sample(name: str, **labels: Any) -> float | None:
    texts = {key: str(value) for key, value in {**LABELS, **labels}.items()}
    return REGISTRY.get_sample_value(PREFIX + name, texts)


def test_counters_move_by_what_came_since(metrics: Metrics) -> None:
    for number in (5, 5, 12):
        metrics.publish(status_dict(was={"fetches": number}, owned_layers=[1, 3]), LABELS)
        assert sample("was_fetches_total") == number
    assert sample("owned_layers") == 2
    assert sample("batch_threshold") is None


def test_steps_carry_their_mode(metrics: Metrics) -> None:
    metrics.publish(status_dict(iterations={"was": 3, "cas": 4}), LABELS)
    assert sample("iterations_total", mode="was") == 3
    assert sample("iterations_total", mode="cas") == 4


def test_the_status_is_asked_for_once_a_second(metrics: Metrics, now: Now) -> None:
    for at, slots in ((100.0, 1), (100.9, 1), (101.0, 2)):
        now.seconds = at
        metrics.publish_each_second(LABELS)
        assert sample("cache_slots") == slots

"""bench.validate_model without engines: what several calibrations of one machine predict."""

from dataclasses import fields, replace

import pytest

from bench.simulator import Request
from bench.validation_predictions import Predictions
from bench.validation_table import summary, table
from sidp_sgl.planner.gpus import find_gpu
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import load_model

FAST = Machine.from_gpu(find_gpu("H200"))
SLOW = replace(
    FAST,
    **{
        field.name: getattr(FAST, field.name) / 2
        for field in fields(Machine)
        if field.name.endswith(("bandwidth", "flops"))
    },
    **{
        field.name: getattr(FAST, field.name) * 2
        for field in fields(Machine)
        if field.name.endswith("seconds")
    },
)
REQUESTS = [Request(number, 0.0, 64, 64, max_new_tokens=64) for number in range(64)]


def predictions(*machines: Machine) -> Predictions:
    return Predictions(load_model("Qwen3-32B"), list(machines), 8)


@pytest.mark.parametrize("side", ["plain", "was", "cas", "auto"])
def test_the_mean_of_two_calibrations_is_predicted(side: str) -> None:
    fast, slow, both = predictions(FAST), predictions(SLOW), predictions(FAST, SLOW)
    step = fast.step_seconds(side, 4, 100)
    assert slow.step_seconds(side, 4, 100) == pytest.approx(2 * step)
    assert both.step_seconds(side, 4, 100) == pytest.approx(1.5 * step)
    rate = fast.tokens_per_second(side, REQUESTS)
    assert slow.tokens_per_second(side, REQUESTS) == pytest.approx(rate / 2)
    assert both.tokens_per_second(side, REQUESTS) == pytest.approx(0.75 * rate)
    assert both.fetch_seconds() == pytest.approx(1.5 * fast.fetch_seconds())
    assert both.threshold(100) == fast.threshold(100), "all slower alike: the same modes"


def test_a_machine_that_moves_is_seen() -> None:
    assert predictions(FAST, SLOW).drift((1, 64), 100) == pytest.approx(1.0)
    assert predictions(FAST, FAST).drift((1, 64), 100) == 0
    row = {"ranks": 2, "what": "step, ms", "side": "was", "batch": 1}
    rows = [{**row, "predicted": 11.0, "measured": 10.0}, {**row, "predicted": 5, "measured": 10}]
    results = {"groups": [{"drift": 0.1, "rows": rows[:1]}, {"drift": 1.0, "rows": rows[1:]}]}
    said = summary(results)
    assert said.startswith("1 of 2 within 20%; median error 30%, largest 50%.")
    assert said.endswith("moved by up to 100%.")
    assert [cells[-2:] for cells in table(results)[1]] == [["+10%", "yes"], ["-50%", "no"]]

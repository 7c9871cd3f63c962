"""Two engines with SiDP under Ray Data on this machine, as examples/ray_data.py runs them.

One dataset for all tests: one of its rows can't be answered, and a rank is killed meanwhile.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from bench.demo_job import CHECKPOINT
from examples.demo_model.arithmetic import few_shot_header, final_answer, held_out_problems
from tests.support.traces import ranks

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]  # two engines, one of them started twice

NUM_PROBLEMS = 63
HEADER = few_shot_header(num_tokens_min=160)
TOO_LONG = "1+" * 3000
ANSWERS = {HEADER + prompt: answer for prompt, answer in held_out_problems(NUM_PROBLEMS)}


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict[str, Any]]]:
    from examples.ray_data import run

    prompts = list(ANSWERS)
    prompts.insert(20, TOO_LONG)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SIDP_CPU_DEVICE_MEMORY", "64MiB")
        ray.init(num_cpus=2, include_dashboard=False)
        try:
            dataset = run(
                ray.data.from_items([{"prompt": prompt} for prompt in prompts]),
                engines=2,
                batch_size=8,
                model_path=str(CHECKPOINT),
                device="cpu",
                dp_size=2,
                random_seed=1,
            )
            rows = iter(dataset.iter_rows())
            first = next(rows)
            main_pid = int(first["engine"].rpartition(":")[2])
            ranks(main_pid)[1].kill()  # SIGKILL; its engine has other rows to answer by now
            yield [first, *rows]
        finally:
            ray.shutdown()


def test_every_row_has_its_answer(results: list[dict[str, Any]]) -> None:
    answered = {row["prompt"]: row["output"] for row in results if not row["error"]}
    assert answered.keys() == ANSWERS.keys() and len(results) == NUM_PROBLEMS + 1
    right = [final_answer(output) == ANSWERS[prompt] for prompt, output in answered.items()]
    assert sum(right) >= 0.95 * NUM_PROBLEMS


def test_an_engine_that_lost_a_rank_is_replaced(results: list[dict[str, Any]]) -> None:
    fetched = {row["engine"]: row["blocks_fetched"] for row in results}
    assert len(fetched) == 3
    assert min(fetched.values()) > 40  # then they stay, for KV is plentiful


def test_a_row_too_long_is_an_error_of_its_own(results: list[dict[str, Any]]) -> None:
    (row,) = [row for row in results if row["error"]]
    assert row["prompt"] == TOO_LONG and row["output"] == ""
    assert "longer than the model's context length" in row["error"]

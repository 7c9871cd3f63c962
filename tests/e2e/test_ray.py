"""Two engines with SiDP under Ray Data on this machine, as examples/ray_data.py runs them."""

import pytest

from bench.demo_job import CHECKPOINT
from examples.demo_model.arithmetic import few_shot_header, final_answer, held_out_problems

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray

NUM_PROBLEMS = 64


def test_two_engines_share_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.ray_data import run

    monkeypatch.setenv("SIDP_CPU_DEVICE_MEMORY", "64MiB")
    header = few_shot_header(num_tokens_min=160)
    problems = held_out_problems(NUM_PROBLEMS)
    rows = [{"prompt": header + prompt, "answer": answer} for prompt, answer in problems]
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        results = run(
            ray.data.from_items(rows),
            engines=2,
            batch_size=8,
            model_path=str(CHECKPOINT),
            device="cpu",
            dp_size=2,
            random_seed=1,
        ).take_all()
    finally:
        ray.shutdown()
    assert sorted(row["prompt"] for row in results) == sorted(row["prompt"] for row in rows)
    right = [final_answer(row["output"]) == row["answer"] for row in results]
    assert sum(right) >= 0.95 * NUM_PROBLEMS
    fetched = {row["engine"]: row["blocks_fetched"] for row in results}
    assert len(fetched) == 2 and min(fetched.values()) > 100

"""Many requests at once behind a shared prefix, on the trained demo model: identical text."""

import os
from pathlib import Path

import pytest

from bench.offline import run_job
from examples.demo_model.arithmetic import few_shot_header, final_answer, held_out_problems
from tests.support.engines import engine, environment, statuses

CHECKPOINT = Path(__file__).parents[2] / "examples" / "demo_model" / "checkpoint"
SAMPLING = {"temperature": 0, "max_new_tokens": 96}
NUM_PROBLEMS = 96


def test_many_requests_give_identical_text_and_right_answers() -> None:
    header = few_shot_header(num_tokens_min=160)
    problems = held_out_problems(NUM_PROBLEMS)
    prompts = [header + prompt for prompt, _ in problems]
    # Small devices: plain DP is short of KV, so the two sides run different batches.
    with environment(SIDP_CPU_DEVICE_MEMORY="8.5MB"):
        with engine(CHECKPOINT, dp_size=2) as plain:
            expected = run_job(plain, 2, prompts, SAMPLING)
        with engine(CHECKPOINT, dp_size=2, sidp=True) as pooled:
            result = run_job(pooled, 2, prompts, SAMPLING)
            states = statuses(pooled)
    assert result.outputs == expected.outputs
    right = [
        final_answer(output) == answer
        for output, (_, answer) in zip(result.outputs, problems, strict=True)
    ]
    assert sum(right) >= 0.95 * len(right)
    assert result.hit_rate > 0.5, "the radix cache must hold the header"
    for status in states:
        assert status["was"]["fetches"] > 100 and status["was"]["resyncs"] == 0
        assert status["placeholders_unmaterialised"] == 2 * (12 - len(status["owned_layers"]))


def test_checkpoint_is_small_enough_to_keep_in_the_repository() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 10_000_000


@pytest.fixture(autouse=True, scope="module")
def nothing_left_in_shared_memory():
    before = set(os.listdir("/dev/shm"))
    yield
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "sidp" in name]

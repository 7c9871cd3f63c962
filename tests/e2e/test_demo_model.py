"""Many requests at once on the trained demo model: identical text behind a shared prefix, and what
`--load-balance-method sidp` does: prefixes stay together, what waits moves, what is aborted is
answered, `routed_dp_rank` is obeyed."""

import asyncio
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import sglang

from bench.demo_job import CHECKPOINT
from bench.offline import JobResult, run_job
from examples.demo_model.arithmetic import (
    few_shot_header,
    held_out_problems,
    solve,
)
from sidp_sgl.errors import SidpUsageError
from tests.support.engines import engine, statuses
from tests.support.traces import traced

DP_SIZE = 2
DEVICE_MEMORY = "8MB"  # about six requests with a header fit into one rank's KV cache
NUM_PROBLEMS = 96
SAMPLING = {"temperature": 0, "max_new_tokens": 96}


def shared_prefix_job() -> list[str]:
    header = few_shot_header(num_tokens_min=160)
    return [header + prompt for prompt, _ in held_out_problems(NUM_PROBLEMS)]


@pytest.fixture(scope="module")
def plain_job() -> JobResult:
    """Plain DP on the same job. Small devices: it is short of KV, so it runs other batches."""
    with (
        patch.dict(os.environ, SIDP_CPU_DEVICE_MEMORY=DEVICE_MEMORY),
        engine(CHECKPOINT, dp_size=DP_SIZE) as plain,
    ):
        return run_job(plain, DP_SIZE, shared_prefix_job(), SAMPLING)


@pytest.fixture(scope="module")
def running(plain_job: JobResult) -> Iterator[sglang.Engine]:
    """After the plain one: an engine that shuts down ends all processes below this one."""
    with traced(SIDP_CPU_DEVICE_MEMORY=DEVICE_MEMORY) as traces:
        with engine(CHECKPOINT, dp_size=DP_SIZE, sidp=True) as started:
            traces.processes()
            yield started
        traces.assert_nothing_left(5.0)


def run(running: sglang.Engine, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All at once; results in the order of the requests."""

    async def everything() -> list[dict[str, Any]]:
        calls = [
            running.async_generate(**{"sampling_params": SAMPLING, **each}) for each in requests
        ]
        return await asyncio.wait_for(asyncio.gather(*calls), 240)

    running.flush_cache()
    return running.loop.run_until_complete(everything())


def dispatched(running: sglang.Engine) -> dict[str, Any]:
    """What the controller says, once it has nothing in hand."""
    found = statuses(running)[0]["dispatch"]
    assert found["method"] == "sidp"
    return found


def texts(results: list[dict[str, Any]]) -> list[str]:
    return [result["text"].strip() for result in results]


def test_many_requests_give_identical_text_and_right_answers(
    plain_job: JobResult, running: sglang.Engine
) -> None:
    result = run_job(running, DP_SIZE, shared_prefix_job(), SAMPLING)
    states = statuses(running)
    assert result.outputs == plain_job.outputs == [*map(solve, shared_prefix_job())]
    assert result.hit_rate > 0.5, "the radix cache must hold the header"
    for status in states:
        assert status["was"]["fetches"] > 100
        assert status["was"]["resyncs"] <= status["residency"]["dropped"]
        assert status["placeholders_unmaterialised"] == 2 * (12 - len(status["owned_layers"]))


def test_each_header_is_computed_by_few_ranks(running: sglang.Engine) -> None:
    headers = [few_shot_header(seed, num_tokens_min=200) for seed in range(4)]
    problems = held_out_problems(120)
    requests = [{"prompt": headers[n % 4] + problem} for n, (problem, _) in enumerate(problems)]
    before = dispatched(running)["sent"]
    results = run(running, requests)
    assert texts(results) == [solve(problem) for problem, _ in problems]
    prompt, cached = (
        sum(result["meta_info"][name] for result in results)
        for name in ("prompt_tokens", "cached_tokens")
    )
    assert cached / prompt > 0.7, "round robin computes each header again and again"
    assert dispatched(running)["sent"] - before == len(requests)
    assert all(status["iterations"]["was"] > 10 for status in statuses(running))


def test_a_request_goes_to_the_rank_that_its_user_wants(running: sglang.Engine) -> None:
    header = few_shot_header(9, num_tokens_min=300)
    problems = held_out_problems(12, seed=1)
    before = [sum(status["iterations"].values()) for status in statuses(running)]
    results = run(
        running,
        [{"prompt": header + problem, "routed_dp_rank": 1} for problem, _ in problems],
    )
    assert texts(results) == [solve(problem) for problem, _ in problems]
    after = [sum(status["iterations"].values()) for status in statuses(running)]
    assert after[0] == before[0] and after[1] > before[1]


def test_what_is_aborted_while_it_waits_is_answered(running: sglang.Engine) -> None:
    header = few_shot_header(7, num_tokens_min=300)
    problems = held_out_problems(60, seed=2)
    sampling = {**SAMPLING, "ignore_eos": True}

    async def one(number: int, problem: str) -> str:
        result = await running.async_generate(header + problem, sampling, rid=f"waits-{number}-")
        return result["meta_info"]["finish_reason"]["type"]

    async def everything() -> list[str]:
        tasks = [asyncio.ensure_future(one(n, p)) for n, (p, _) in enumerate(problems)]
        await asyncio.sleep(0.5)
        for number in range(1, len(problems), 2):
            running.tokenizer_manager.abort_request(f"waits-{number}-")
        return await asyncio.wait_for(asyncio.gather(*tasks), 240)

    before = dispatched(running)["sent"]
    reasons = running.loop.run_until_complete(everything())
    assert set(reasons[::2]) == {"length"}
    assert "abort" in reasons[1::2], "some waited still"
    assert dispatched(running)["sent"] - before == len(problems)
    assert dispatched(running)["queued"] == 0


def test_what_waits_moves_to_a_rank_that_runs_empty(running: sglang.Engine) -> None:
    """Rank 0 is full for long: of four requests two wait there until rank 1 has done the others."""
    before = dispatched(running)["moved"]
    capacity = statuses(running)[0]["kv_capacity_tokens"]
    filler = {
        "prompt": few_shot_header(30, num_tokens_min=capacity // 2),
        "sampling_params": {**SAMPLING, "max_new_tokens": capacity // 4, "ignore_eos": True},
        "routed_dp_rank": 0,
    }
    problems = held_out_problems(4, seed=3)
    waiting = [
        {"prompt": few_shot_header(31 + n, num_tokens_min=capacity // 2) + problem}
        for n, (problem, _) in enumerate(problems)
    ]
    results = run(running, [filler, *waiting])
    assert texts(results)[1:] == [solve(problem) for problem, _ in problems]
    assert dispatched(running)["moved"] > before


def test_what_would_end_a_rank_is_refused_and_nobody_notices(running: sglang.Engine) -> None:
    bad = [
        {"prompt": ["x", ""]},
        {"prompt": ""},
        {"input_ids": [[5], []]},
        {"input_ids": [5, 10**6]},
        {"input_ids": [[5], [5, -1]]},
    ]

    async def everything() -> list[BaseException]:
        (problem, _), *_ = held_out_problems(1, seed=5)
        neighbour = asyncio.ensure_future(running.async_generate(problem, SAMPLING))
        await asyncio.sleep(0.05)
        calls = [running.async_generate(**each, sampling_params=SAMPLING) for each in bad]
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert solve(problem) == (await neighbour)["text"].strip()
        return errors

    errors = running.loop.run_until_complete(asyncio.wait_for(everything(), 60))
    assert [type(error) for error in errors] == [ValueError] * len(bad), errors
    for each in bad:
        with pytest.raises(ValueError):
            running.generate(**each, sampling_params=SAMPLING)


def test_a_second_event_loop_is_an_error(running: sglang.Engine) -> None:
    running.generate("1+2=", SAMPLING)
    with pytest.raises(SidpUsageError, match=r"within one asyncio\.run"):
        asyncio.run(asyncio.wait_for(running.async_generate("1+2=", SAMPLING), 30))
    assert running.generate("1+2=", SAMPLING)["text"]


@pytest.mark.parametrize("name", ["checkpoint", "moe"])
def test_checkpoint_is_small_enough_to_keep_in_the_repository(name: str) -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.with_name(name).iterdir()) < 10_000_000

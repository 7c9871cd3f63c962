"""Owners that stop or die while they compute for another rank: a delay, or the end of every call
with an error that names them; never other tokens.

The test's own process stands for the user's: it has to survive. One engine for both: whoever kills
comes last.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import psutil
import pytest
import sglang

from sidp_sgl.scheduler.lifecycle.liveness import RankFailure
from tests.support.checkpoints import write_checkpoint
from tests.support.engines import engine, statuses
from tests.support.traces import Traces, ranks, traced

SETTINGS = {
    "dp_size": 2,
    "sidp": True,
    "sidp_mode": "cas",
    "sidp_pool": "linear",  # many calls per step: whenever a rank stops, one is under way
    "sidp_cache_slots": 1,
    "skip_tokenizer_init": True,
    "disable_radix_cache": True,
}
REQUESTER, OWNER = 0, 1
PROMPT = [5, 6, 7, 8]
LONG = {"temperature": 0, "max_new_tokens": 600, "ignore_eos": True}
STOP_SECONDS = 5.0
GRACE_SECONDS = 5.0  # what the stop may delay a token beyond its own time
END_SECONDS = 15.0  # from the kill to the error


class Running(NamedTuple):
    engine: sglang.Engine
    traces: Traces


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = write_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", num_layers=8)
    with traced(PYTHONWARNINGS="ignore") as traces, engine(model, **SETTINGS) as started:
        traces.processes()
        yield Running(started, traces)


def owner_process() -> psutil.Process:
    return ranks(os.getpid())[OWNER]


async def chunks(started: sglang.Engine) -> AsyncIterator[list[int]]:
    """A long generation on the requester: its token ids so far."""
    stream = await started.async_generate(
        input_ids=PROMPT, sampling_params=LONG, routed_dp_rank=REQUESTER, stream=True
    )
    async for chunk in stream:
        yield chunk["output_ids"]


class Run(NamedTuple):
    token_ids: list[int]
    longest_pause: float  # seconds between two chunks
    stopped_at: int  # tokens


def generate(started: sglang.Engine, stop_at: int | None = None) -> Run:
    """With `stop_at`, the owner is stopped for STOP_SECONDS once that many tokens are there."""
    owner = owner_process()

    async def stop() -> None:
        owner.suspend()
        await asyncio.sleep(STOP_SECONDS)
        owner.resume()

    async def run() -> Run:
        stopping: asyncio.Task | None = None
        token_ids: list[int] = []
        stopped_at, longest_pause, before = 0, 0.0, time.monotonic()
        async for token_ids in chunks(started):
            longest_pause = max(longest_pause, time.monotonic() - before)
            before = time.monotonic()
            if stop_at is not None and stopping is None and len(token_ids) >= stop_at:
                stopped_at, stopping = len(token_ids), asyncio.create_task(stop())
                await asyncio.sleep(0)
        if stopping is not None:
            await stopping
        return Run(token_ids, longest_pause, stopped_at)

    try:
        return started.loop.run_until_complete(asyncio.wait_for(run(), 120.0))
    finally:
        owner.resume()


def cas_steps(states: list[dict[str, Any]]) -> int:
    return states[REQUESTER]["iterations"]["cas"]


def assert_every_row_was_served(states: list[dict[str, Any]]) -> None:
    assert states[OWNER]["cas"]["rows_served"] == states[REQUESTER]["cas"]["rows_sent"] > 0
    assert states[REQUESTER]["cas"]["rows_served"] == states[OWNER]["cas"]["rows_sent"]
    assert all(state["cas"]["failed"] == 0 for state in states)


def test_a_stopped_owner_delays_and_changes_no_token(running: Running) -> None:
    started = running.engine
    expected = generate(started)
    assert len(expected.token_ids) == LONG["max_new_tokens"]
    before = statuses(started)
    assert cas_steps(before) > 0.9 * LONG["max_new_tokens"]
    assert_every_row_was_served(before)

    disturbed = generate(started, stop_at=100)
    assert 100 <= disturbed.stopped_at < len(disturbed.token_ids)
    assert disturbed.token_ids == expected.token_ids
    assert disturbed.longest_pause < STOP_SECONDS + GRACE_SECONDS
    after = statuses(started)
    requester = after[REQUESTER]["cas"]
    assert requester["fallbacks"] + requester["silent"] >= 1
    assert_every_row_was_served(after)

    assert generate(started).token_ids == expected.token_ids
    last = statuses(started)
    assert cas_steps(last) - cas_steps(after) > 0.9 * LONG["max_new_tokens"], "CaS goes on"
    assert_every_row_was_served(last)


def test_an_owner_killed_in_the_middle_of_cas_steps_ends_every_call(running: Running) -> None:
    started = running.engine
    owner = owner_process()
    running.traces.processes()
    killed_at = 0.0

    async def stream() -> None:
        nonlocal killed_at
        async for token_ids in chunks(started):
            if not killed_at and len(token_ids) >= 100:
                killed_at = time.monotonic()
                owner.kill()

    async def single() -> Any:
        return await started.async_generate(
            input_ids=PROMPT, sampling_params=LONG, routed_dp_rank=OWNER
        )

    async def batch() -> Any:
        return await started.async_generate(input_ids=[PROMPT] * 4, sampling_params=LONG)

    async def control() -> Any:
        while not killed_at:
            await asyncio.sleep(0.001)
        return await started.tokenizer_manager.get_internal_state()

    async def calls() -> list[Any]:
        pending = stream(), single(), batch(), control()
        return await asyncio.gather(*pending, return_exceptions=True)

    failures = started.loop.run_until_complete(asyncio.wait_for(calls(), 120.0))
    assert killed_at and time.monotonic() - killed_at < END_SECONDS
    assert [type(failure) for failure in failures] == [RankFailure] * len(failures)
    killed = rf"DP rank {OWNER} \(pid {owner.pid}\) was killed by SIGKILL while .* running"
    with pytest.raises(RankFailure, match=killed):
        started.get_server_info()
    with pytest.raises(RankFailure):
        started.generate(input_ids=PROMPT, sampling_params=LONG)
    with pytest.raises(RankFailure):
        next(started.generate(input_ids=PROMPT, sampling_params=LONG, stream=True))
    running.traces.assert_nothing_left(0.0)
    assert not running.traces.new_children()

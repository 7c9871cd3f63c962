"""With tensor parallelism: every TP rank pools its shards with those of the other DP ranks.

Against plain SGLang at the same TP size, with the same overlap scheduler: TP sizes round
differently. Beside each equality stand the counters of both TP ranks.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sglang

from bench.demo_job import CHECKPOINT
from examples.demo_model.arithmetic import solve
from sidp_sgl.scheduler.lifecycle.liveness import RankFailure
from tests.e2e.test_cas import make_requests, run
from tests.e2e.test_failures import END_SECONDS as START_END_SECONDS
from tests.e2e.test_failures import Killer
from tests.e2e.test_parity import (
    NEW_TOKENS,
    PROMPTS,
    SETTINGS,
    Model,
    Plain,
    plain_sglang,
    rows_of,
)
from tests.support.checkpoints import write_checkpoint
from tests.support.disturbances import Disturbances, disturbed
from tests.support.engines import answer, engine, statuses
from tests.support.traces import Traces, members, traced

SIZES = {"dp_size": 2, "tp_size": 2}
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 64, 192, 4, 2, 16  # of the seeded checkpoints
STOP_SECONDS = 3.0
END_SECONDS = 5.0  # from the kill to the error


class Case(NamedTuple):
    model: Model
    pool: str
    mode: str
    slots: int
    switch_every: int = 0
    victim: tuple[int, int] = (0, 1)  # DP and TP rank, killed at the end
    tp_size: int = 2


AUTO = Case(Model("qwen3", 7, True), "linear", "auto", 1, switch_every=3)
THOROUGH = [
    Case(Model("llama", 8, False), "ffn", "was", 3, victim=(1, 1)),
    Case(Model("qwen3", 7, True), "linear", "was", 2),
    Case(Model("llama", 7, False), "linear", "cas", 1, victim=(0, 0)),
    Case(Model("qwen3", 8, True), "ffn", "auto", 2, switch_every=3, victim=(1, 0)),
    Case(Model("qwen3", 8, True), "linear", "cas", 1),
    Case(Model("llama", 8, False), "linear", "auto", 1, switch_every=3),
    # More TP ranks than KV heads.
    Case(Model("llama", 7, False), "ffn", "auto", 1, switch_every=3, victim=(1, 3), tp_size=4),
]


class Running(NamedTuple):
    case: Case
    plain: Plain
    engine: sglang.Engine
    traces: Traces


@pytest.fixture(
    scope="module",
    params=[*(pytest.param(case, marks=pytest.mark.thorough) for case in THOROUGH), AUTO],
    ids=lambda case: (
        f"{case.model.architecture}-{case.model.num_layers}-{case.mode}-{case.tp_size}"
    ),
)
def running(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    case = request.param
    plain = plain_sglang(case.model, tmp_path_factory.getbasetemp(), tp_size=case.tp_size)
    with (
        disturbed(Disturbances(switch_every=case.switch_every)),
        traced(PYTHONWARNINGS="ignore") as traces,
        engine(
            plain.folder,
            sidp=True,
            sidp_mode=case.mode,
            sidp_residency="off",
            sidp_pool=case.pool,
            sidp_cache_slots=case.slots,
            dp_size=SIZES["dp_size"],
            tp_size=case.tp_size,
            **SETTINGS,
        ) as started,
    ):
        traces.processes()
        yield Running(case, plain, started, traces)


def test_single_requests_equal_plain_sglang_bit_for_bit(running: Running) -> None:
    case, plain, started, _ = running
    assert plain.overlap, "the overlap scheduler must be on"
    for rank in range(SIZES["dp_size"]):
        before = statuses(started)
        for prompt, expected in zip(PROMPTS, plain.answers, strict=True):
            assert answer(started, prompt, NEW_TOKENS, rank) == expected
        check_steps(case, rank, before, statuses(started))
    for status in statuses(started):
        check_members(case, status)
        assert status["kv_capacity_tokens"] > plain.kv_tokens


def check_steps(case: Case, rank: int, before: list[dict], after: list[dict]) -> None:
    """Only `rank` had work; its TP ranks sent the same rows, each to its own group's owner."""
    old, new, owner = before[rank], after[rank], 1 - rank
    decode_steps = len(PROMPTS) * (NEW_TOKENS - 1)
    cas_steps = new["iterations"]["cas"] - old["iterations"]["cas"]
    if case.mode == "cas":
        assert cas_steps >= 0.9 * decode_steps, new["cas"]
    elif case.mode == "auto":
        assert 0.3 * decode_steps < cas_steps < 0.7 * decode_steps
        assert new["mode_switches"] - old["mode_switches"] >= decode_steps // 3 - 2
    else:
        assert cas_steps == 0
    remote_blocks = case.model.num_layers - len(new["owned_layers"]) - case.slots
    units = {"ffn": 1, "linear": 3}[case.pool]
    for tp_rank in range(case.tp_size):
        sent, served = (
            after[dp]["members"][tp_rank]["cas"][name] - before[dp]["members"][tp_rank]["cas"][name]
            for dp, name in ((rank, "rows_sent"), (owner, "rows_served"))
        )
        assert sent == served
        assert sent in {rows * remote_blocks * units for rows in rows_of(cas_steps)}


def check_members(case: Case, status: dict) -> None:
    """Each TP rank fetched its own shard, as often as the other."""
    size = case.tp_size
    assert (status["tp_rank"], status["tp_size"]) == (0, size)
    assert [member["tp_rank"] for member in status["members"]] == list(range(size))
    block = 3 * HIDDEN * INTERMEDIATE * 2 // size
    if case.pool == "linear":
        block += 2 * HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) // size
    assert status["pooled_bytes"] == case.model.num_layers * block
    for member in status["members"]:
        assert member["owned_bytes"] == len(status["owned_layers"]) * block
        assert member["was"]["fetches"] > case.slots
        assert member["was"]["bytes"] == member["was"]["fetches"] * block
        assert member["was"]["resyncs"] == 0
        assert member["cas"]["fallbacks"] == member["cas"]["failed"] == 0
    first = status["members"][0]
    for other in status["members"][1:]:
        assert first["was"]["fetches"] == other["was"]["fetches"]
        for name in ("calls", "rows_sent", "rows_served", "gemms"):
            assert first["cas"][name] == other["cas"][name]


# What happens to one process happens to its rank.

REQUESTER, OWNER = 0, 1
NUM_TOKENS = 150


async def generate(
    started: sglang.Engine, at: int = 0, event: Any = None, num_tokens: int = NUM_TOKENS
) -> list[int]:
    """On the requester, token by token; `event()` when `at` tokens are there."""
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    stream = await started.async_generate(
        input_ids=PROMPTS[0], sampling_params=sampling, routed_dp_rank=REQUESTER, stream=True
    )
    token_ids: list[int] = []
    async for chunk in stream:
        if event is not None and len(token_ids) < at <= len(chunk["output_ids"]):
            event()
        token_ids = list(chunk["output_ids"])  # the engine goes on filling its own
    return token_ids


def generate_while_stopped(started: sglang.Engine, victim: tuple[int, int]) -> list[int]:
    """`victim`, a DP and a TP rank, is stopped for a while when 50 tokens are there."""
    process = members(os.getpid())[victim]

    def stop() -> None:
        process.suspend()
        started.loop.call_later(STOP_SECONDS, process.resume)

    try:
        return started.loop.run_until_complete(
            asyncio.wait_for(generate(started, at=50, event=stop), 120.0)
        )
    finally:
        process.resume()


def test_a_stopped_follower_makes_its_rank_wait_and_changes_no_token(running: Running) -> None:
    """TP rank 0 and the others wait for it in their sums."""
    if running.case != AUTO:
        pytest.skip("one engine is enough")
    started = running.engine
    expected = started.loop.run_until_complete(generate(started))
    begun = time.monotonic()
    assert generate_while_stopped(started, (REQUESTER, 1)) == expected
    assert time.monotonic() - begun > STOP_SECONDS


def test_a_silent_member_of_an_owner_changes_no_token(running: Running) -> None:
    """Its TP rank's requester computes by itself, the other one goes on sending."""
    if running.case != AUTO:
        pytest.skip("one engine is enough")
    started = running.engine
    expected = started.loop.run_until_complete(generate(started))
    before = statuses(started)
    got = generate_while_stopped(started, (OWNER, 1))
    assert got == expected and len(got) == NUM_TOKENS
    after = statuses(started)
    fallbacks = [
        new["cas"]["fallbacks"] - old["cas"]["fallbacks"]
        for old, new in zip(before[REQUESTER]["members"], after[REQUESTER]["members"], strict=True)
    ]
    assert fallbacks[0] == 0 < fallbacks[1]
    assert started.loop.run_until_complete(generate(started)) == expected
    last = statuses(started)
    for old, new in zip(after[REQUESTER]["members"], last[REQUESTER]["members"], strict=True):
        assert new["cas"]["calls"] > old["cas"]["calls"], "both send again"
    for tp_rank in range(SIZES["tp_size"]):
        sent = last[REQUESTER]["members"][tp_rank]["cas"]["rows_sent"]
        assert last[OWNER]["members"][tp_rank]["cas"]["rows_served"] == sent


def test_a_killed_tp_rank_ends_the_engine_with_its_name(running: Running) -> None:
    """The last test of an engine."""
    started, victim = running.engine, running.case.victim
    process = members(os.getpid())[victim]
    running.traces.processes()
    killed_at = 0.0

    def kill() -> None:
        nonlocal killed_at
        killed_at = time.monotonic()
        process.kill()

    with pytest.raises(RankFailure) as caught:
        started.loop.run_until_complete(
            asyncio.wait_for(generate(started, at=50, event=kill, num_tokens=1900), 120.0)
        )
    assert killed_at and time.monotonic() - killed_at < END_SECONDS
    dp_rank, tp_rank = victim
    caught.match(
        rf"^DP rank {dp_rank}, TP rank {tp_rank} \(pid {process.pid}\) was killed by SIGKILL"
    )
    with pytest.raises(RankFailure, match=f"TP rank {tp_rank}"):
        started.generate(input_ids=PROMPTS[0])
    running.traces.assert_nothing_left(0.0)


@pytest.mark.thorough
def test_a_tp_rank_killed_while_starting(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "qwen3", num_layers=4)
    with traced(SIDP_CPU_DEVICE_MEMORY="16MiB", PYTHONWARNINGS="ignore") as traces:
        killer = Killer(traces, num_processes=4)
        with pytest.raises(RankFailure) as caught:
            sglang.Engine(
                model_path=str(model), device="cpu", sidp=True, log_level="error", **SIZES
            )
        assert time.monotonic() - killer.time < START_END_SECONDS
        caught.match(
            rf"DP rank [01], TP rank [01] \(pid {killer.victim.pid}\) was killed by SIGKILL while "
            "the engine was starting"
        )
        traces.assert_nothing_left(0.0)


@pytest.mark.thorough
def test_many_requests_with_aborts_give_the_right_texts() -> None:
    """Batches, prefixes, requests that are called back; all TP ranks stay in step."""
    requests = make_requests(2)
    faults = Disturbances(switch_every=4, decline=0.1, delay=0.05, delay_ms=20, seed=3)
    with disturbed(faults), engine(CHECKPOINT, sidp=True, **SIZES) as started:
        texts = run(started, requests)
        states = statuses(started)
    assert texts == [
        None if request.is_aborted else solve(request.prompt)[: request.max_new_tokens]
        for request in requests
    ]
    assert all(state["mode_switches"] > 5 for state in states)
    for tp_rank in range(SIZES["tp_size"]):
        counters = [state["members"][tp_rank]["cas"] for state in states]
        sent = sum(counter["rows_sent"] for counter in counters)
        assert sum(counter["rows_served"] for counter in counters) == sent > 0
        assert all(counter["failed"] == 0 for counter in counters)
    for state in states:
        first, second = (member["cas"]["rows_sent"] for member in state["members"])
        assert first == second

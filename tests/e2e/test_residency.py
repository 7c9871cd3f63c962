"""Blocks stay in KV memory that nobody needs: steps are then plain data parallelism's, bit for bit,
and the memory is there when a request needs it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang

from tests.support.checkpoints import write_checkpoint
from tests.support.engines import Answer, answer, engine, statuses

NEW_TOKENS = 12
SETTINGS = {"skip_tokenizer_init": True, "chunked_prefill_size": 256}
DEVICE_MEMORY = "5MB"
SHORT = [[7, 8, 9], [(11 * k) % 250 + 3 for k in range(40)]]
LONG = [(13 * k) % 250 + 3 for k in range(4000)]
SECONDS = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "qwen3"
    write_checkpoint(path, "qwen3", num_layers=7, tie_embeddings=True, max_position_embeddings=8192)
    return path


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Answer]:
    """Plain SGLang's; its end takes every engine of the process with it."""
    with engine(model, **SETTINGS) as plain:
        return [answer(plain, prompt, NEW_TOKENS) for prompt in [*SHORT, LONG]]


@pytest.fixture(scope="module")
def pooled(expected: list[Answer], model: Path) -> Iterator[sglang.Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIDP_CPU_DEVICE_MEMORY", DEVICE_MEMORY)
        with engine(model, dp_size=2, sidp=True, sidp_cache_slots=1, **SETTINGS) as running:
            yield running


def wait_for(running: sglang.Engine, is_so: Callable[[dict[str, Any]], bool]) -> list[dict]:
    """Statuses, once `is_so` of all ranks."""
    deadline = time.monotonic() + SECONDS
    while not all(map(is_so, found := statuses(running))):
        assert time.monotonic() < deadline, [status["residency"] for status in found]
        time.sleep(0.2)
    return found


def has_all_blocks(status: dict[str, Any]) -> bool:
    return 0 < status["residency"]["needed"] == status["residency"]["blocks"]


def test_an_idle_engine_becomes_local(pooled: sglang.Engine) -> None:
    for status in wait_for(pooled, has_all_blocks):
        assert status["residency"]["dropped"] == 0
        assert 0 < status["residency"]["tokens"] < status["kv_headroom_tokens"]


def test_local_steps_are_plain_sglangs(pooled: sglang.Engine, expected: list[Answer]) -> None:
    before = wait_for(pooled, has_all_blocks)
    for rank in range(2):
        for prompt, right in zip(SHORT, expected, strict=False):
            assert answer(pooled, prompt, NEW_TOKENS, rank) == right
    for was, now in zip(before, statuses(pooled), strict=True):
        steps = {
            mode: now["iterations"][mode] - was["iterations"][mode] for mode in was["iterations"]
        }
        assert steps["local"] >= 2 * NEW_TOKENS and steps["was"] == steps["cas"] == 0
        assert now["was"]["fetches"] == was["was"]["fetches"], "nothing comes from other ranks"
        assert now["cas"]["calls"] == was["cas"]["calls"]
        assert now["mode"] == "local"


def test_blocks_go_when_a_request_needs_their_memory(
    pooled: sglang.Engine, expected: list[Answer]
) -> None:
    before = wait_for(pooled, has_all_blocks)
    capacity = before[1]["kv_capacity_tokens"]
    assert capacity - before[1]["residency"]["tokens"] < len(LONG) < capacity, "it needs some of it"
    assert answer(pooled, LONG, NEW_TOKENS, 1) == expected[2]
    first, second = statuses(pooled)
    assert first["residency"]["dropped"] == 0, "the other rank keeps its own"
    assert second["residency"]["dropped"] > before[1]["residency"]["dropped"]
    assert second["iterations"]["local"] > before[1]["iterations"]["local"], "as long as it could"
    assert second["was"]["fetches"] > before[1]["was"]["fetches"]
    # What the request has left in the radix cache goes when it is cold.
    wait_for(pooled, has_all_blocks)
    assert answer(pooled, SHORT[1], NEW_TOKENS, 1) == expected[1]
    assert statuses(pooled)[1]["mode"] == "local"

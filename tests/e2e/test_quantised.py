"""Quantised checkpoints: blocks hold what SGLang has made of them, and answers are plain SGLang's.

Beside each equality stand the counters: fetches, rows that owners computed, bytes of a block.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e.test_parity import NEW_TOKENS, PROMPTS, SETTINGS
from tests.support.checkpoints import write_checkpoint
from tests.support.disturbances import Disturbances, disturbed
from tests.support.engines import Answer, answer, engine, statuses
from tests.support.quantised import write_quantised

LOGPROB_TOLERANCE = 1e-5
NUM_LAYERS = 6
FLAGS = {"w8a8_int8": {"quantization": "w8a8_int8"}, "awq": {"dtype": "float16"}}
# Shared by an FFN's two projections in BF16, in bytes per layer (hidden 128, intermediate 256).
BF16_BYTES = 3 * 128 * 256 * 2


class Case(NamedTuple):
    method: str
    mode: str = "auto"
    pool: str = "ffn"
    architecture: str = "qwen3"


CASES = [Case("fp8_blocks", "auto", "all", "qwen3_moe")]  # all that can be pooled, in one
THOROUGH = [
    Case("fp8_blocks", "auto"),
    Case("fp8_blocks", "was", "linear"),
    Case("fp8_tensors", "auto", "linear"),
    Case("w8a8_int8", "auto", "linear"),
    Case("awq", "auto", "linear"),
    Case("compressed_fp8", "auto", "linear"),
    Case("compressed_int8", "was"),
]


@pytest.fixture(
    scope="module",
    params=[*CASES, *(pytest.param(case, marks=pytest.mark.thorough) for case in THOROUGH)],
    ids=lambda case: "-".join(case),
)
def pooled(
    request: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Case, list[Answer], int, Any]]:
    case = request.param
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(
        folder / "base",
        case.architecture,
        num_layers=NUM_LAYERS,
        hidden_size=128,
        intermediate_size=256,
        head_dim=64,  # so that keys and values fill blocks of 128
        **({"moe_intermediate_size": 128} if case.architecture == "qwen3_moe" else {}),
    )
    path = write_quantised(folder / case.method, folder / "base", case.method)
    settings = SETTINGS | FLAGS.get(case.method, {})
    with engine(path, **settings) as running:
        expected = [answer(running, prompt, NEW_TOKENS) for prompt in PROMPTS]
        memory = running.get_server_info()["internal_states"][0]["memory_usage"]
    disturbances = Disturbances(switch_every=3) if case.mode == "auto" else Disturbances()
    with (
        disturbed(disturbances),
        engine(
            path,
            dp_size=2,
            sidp=True,
            sidp_mode=case.mode,
            sidp_pool=case.pool,
            sidp_cache_slots=1,
            **settings,
        ) as running,
    ):
        yield case, expected, memory["token_capacity"], running


def test_single_requests_equal_plain_sglang(
    pooled: tuple[Case, list[Answer], int, Any],
) -> None:
    case, expected, kv_tokens, running = pooled
    tolerance = 0.0 if case.mode == "was" else LOGPROB_TOLERANCE
    for rank in range(2):
        for prompt, one in zip(PROMPTS, expected, strict=True):
            got = answer(running, prompt, NEW_TOKENS, rank)
            assert got.token_ids == one.token_ids
            assert got.logprobs == pytest.approx(one.logprobs, abs=tolerance)
    for status in statuses(running):
        fetched = NUM_LAYERS - len(status["owned_layers"])
        assert status["was"]["fetches"] > 2 * fetched and status["was"]["resyncs"] == 0
        assert (status["cas"]["rows_sent"] > 0) == (case.mode == "auto")
        assert status["cas"]["fallbacks"] == status["cas"]["failed"] == 0
        assert status["placeholders_unmaterialised"] >= 4 * fetched, "weights and scales"
        assert status["kv_capacity_tokens"] > kv_tokens
        if case.architecture == "qwen3" and case.pool == "ffn":
            assert status["pooled_bytes"] < 0.6 * NUM_LAYERS * BF16_BYTES

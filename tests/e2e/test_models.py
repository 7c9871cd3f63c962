"""Mixtures, quantised checkpoints and pooled tables give what plain SGLang gives (docs/models.md).

Bit for bit in WaS; in `auto` and CaS rows of single requests are computed as they would be locally.
Beside each equality stand the counters: fetches, rows that owners computed, placeholders, memory.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench.offline import run_job
from tests.e2e.test_parity import NEW_TOKENS, PROMPTS, SETTINGS, Plain, planned_kv_tokens
from tests.support.checkpoints import write_checkpoint
from tests.support.disturbances import Disturbances, disturbed
from tests.support.engines import Answer, answer, engine, statuses
from tests.support.quantised import write_quantised

NUM_LAYERS = 7
# FP8 blocks are 128 wide: projections, experts, keys and values of each model fill some.
# The planner counts the rotary table as GPUs keep it; short, it is as good as nothing.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 1500,
    "max_position_embeddings": 512,
}
SIZES_OF = {
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 64, "moe_intermediate_size": 128},
}
FLAGS = {"w8a8_int8": {"quantization": "w8a8_int8"}, "awq": {"dtype": "float16"}}
PENALISED = {"temperature": 0, "max_new_tokens": 12, "frequency_penalty": 0.7}
LOGPROB_TOLERANCE = 1e-5
MERGING_ROUNDS = 8  # until calls of two ranks happen to meet at an owner


class Case(NamedTuple):
    architecture: str
    method: str = ""  # of quantisation
    pool: str = "ffn"
    mode: str = "auto"
    slots: int | None = None
    dp_size: int = 2
    placement: str = "interleaved"


CASES = [Case("qwen3_moe", "fp8_blocks", "all", slots=1)]  # all that can be pooled, in one
THOROUGH = [
    Case("qwen3_moe", mode="was", dp_size=3),
    Case("qwen3_moe", mode="cas", slots=1, dp_size=3),
    Case("qwen2_moe", placement="contiguous"),
    Case("qwen2_moe", mode="was", slots=1),
    Case("mixtral", pool="linear", slots=1),
    Case("mixtral", mode="was", dp_size=3, placement="contiguous"),
    Case("deepseek_v2", slots=1),
    Case("deepseek_v3", pool="linear", mode="was", dp_size=3),
    Case("deepseek_v3", mode="cas", slots=1, dp_size=3),
    Case("qwen3", "fp8_blocks", mode="was", dp_size=3),
    Case("qwen3", "fp8_tensors", "linear", slots=1),
    Case("qwen3", "w8a8_int8", "linear", slots=1),
    Case("qwen3", "awq", "linear", slots=1, placement="contiguous"),
    Case("qwen3", "compressed_fp8", "linear", slots=1),
    Case("qwen3", "compressed_int8", mode="was", slots=1),
    Case("qwen3", pool="all", mode="cas", slots=1),  # its tables are tied
    Case("llama", pool="all", mode="was", slots=1, dp_size=3),
    Case("llama", pool="all", slots=2),
]


class Pooled(NamedTuple):
    case: Case
    expected: list[tuple[Any, ...]]  # by prompt
    plain: Plain
    engine: Any


@pytest.fixture(
    scope="module",
    params=[*CASES, *(pytest.param(case, marks=pytest.mark.thorough) for case in THOROUGH)],
    ids=lambda case: "-".join(map(str, case)),
)
def pooled(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pooled]:
    case = request.param
    path: Path = tmp_path_factory.mktemp("checkpoints") / "model"
    sizes = SIZES | SIZES_OF.get(case.architecture, {})
    tied = case.architecture == "qwen3"
    write_checkpoint(path, case.architecture, num_layers=NUM_LAYERS, tie_embeddings=tied, **sizes)
    if case.method:
        path = write_quantised(path.with_name(case.method), path, case.method)
    settings = SETTINGS | FLAGS.get(case.method, {})
    with engine(path, **settings) as running:
        expected = [everything(running, prompt) for prompt in PROMPTS]
        memory = running.get_server_info()["internal_states"][0]["memory_usage"]
    plain = Plain(path, [], memory["token_capacity"], True)
    switches = Disturbances(switch_every=3 if case.mode == "auto" else 0)
    with (
        disturbed(switches),
        engine(
            path,
            dp_size=case.dp_size,
            sidp=True,
            sidp_mode=case.mode,
            sidp_residency="off",
            sidp_pool=case.pool,
            sidp_cache_slots=case.slots,
            sidp_placement=case.placement,
            **settings,
        ) as running,
    ):
        yield Pooled(case, expected, plain, running)


def everything(
    running: Any, prompt: list[int], rank: int | None = None
) -> tuple[Answer, list[int], list[float]]:
    """Greedy output, the same with a penalty, and the prompt's logprobs."""
    penalised = running.generate(input_ids=prompt, sampling_params=PENALISED, routed_dp_rank=rank)
    prompted = running.generate(
        input_ids=prompt,
        sampling_params={"temperature": 0, "max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=0,
        routed_dp_rank=rank,
    )
    logprobs = [value for value, *_ in prompted["meta_info"]["input_token_logprobs"][1:]]
    return answer(running, prompt, NEW_TOKENS, rank), penalised["output_ids"], logprobs


def test_single_requests_equal_plain_sglang(pooled: Pooled) -> None:
    case, running = pooled.case, pooled.engine
    tolerance = 0.0 if case.mode == "was" else LOGPROB_TOLERANCE
    for rank in range(case.dp_size):
        before = statuses(running)
        for prompt, (plain, penalised, logprobs) in zip(PROMPTS, pooled.expected, strict=True):
            got, got_penalised, got_logprobs = everything(running, prompt, rank)
            assert got.token_ids == plain.token_ids and got_penalised == penalised
            assert got.logprobs == pytest.approx(plain.logprobs, abs=tolerance)
            assert got_logprobs == pytest.approx(logprobs, abs=tolerance)
        check_mechanism(case, rank, before, statuses(running))
    check_memory(pooled, statuses(running))


def test_owners_compute_rows_of_several_ranks_together(pooled: Pooled) -> None:
    case, running = pooled.case, pooled.engine
    if case.mode != "cas" or case.dp_size < 3:
        pytest.skip("an owner computes for one other rank")
    ranks = [rank for rank in range(case.dp_size) for _ in PROMPTS]
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    expected = [list(plain.token_ids) for plain, *_ in pooled.expected] * case.dp_size
    for _ in range(MERGING_ROUNDS):
        job = run_job(running, case.dp_size, PROMPTS * case.dp_size, sampling, ranks=ranks)
        assert job.outputs == expected
        if sum(status["cas"]["fused_gemms"] for status in statuses(running)):
            return
    pytest.fail("no owner has merged rows")


def check_mechanism(case: Case, rank: int, before: list[dict], after: list[dict]) -> None:
    """Only `rank` had work: what it fetched, and what owners computed for it, row for row."""
    old, new = before[rank], after[rank]
    fetched = NUM_LAYERS - len(new["owned_layers"])
    steps = {mode: new["iterations"][mode] - old["iterations"][mode] for mode in ("was", "cas")}
    assert new["was"]["fetches"] - old["was"]["fetches"] >= (steps["was"] - 1) * fetched
    assert new["was"]["resyncs"] == 0
    sent = new["cas"]["rows_sent"] - old["cas"]["rows_sent"]
    served = sum(status["cas"]["rows_served"] for status in after)
    assert sent == served - sum(status["cas"]["rows_served"] for status in before)
    assert sent >= steps["cas"] * (fetched - new["cache_slots"])
    assert (steps["cas"] > 20) == (case.mode != "was")
    assert new["cas"]["fallbacks"] == new["cas"]["failed"] == 0
    owners = 0 if case.mode == "was" else case.dp_size - 1
    checked = new["self_check"]
    assert checked["blocks"] >= fetched and checked["owners_called"] == owners
    assert new["placeholders_unmaterialised"] >= 2 * fetched * (2 if case.method else 1)


def check_memory(pooled: Pooled, after: list[dict]) -> None:
    case = pooled.case
    slots = 3 if case.architecture in ("llama", "qwen3") else 2
    for status in after:
        assert status["cache_slots"] == (case.slots or slots)
        assert status["kv_capacity_tokens"] > pooled.plain.kv_tokens
        # No rank reads another's experts, nor a table of which it owns nothing.
        size = sum(file.stat().st_size for file in pooled.plain.folder.glob("*.safetensors"))
        assert status["checkpoint_bytes_read"] < size - status["pooled_bytes"] / 2 / case.dp_size
    if case.pool == "all":
        assert after[0]["replicated_bytes"] < SIZES["vocab_size"] * SIZES["hidden_size"] * 2
    if case.method in ("", "fp8_blocks"):
        planned = planned_kv_tokens(pooled.plain, after[0], "sidp")
        fullest = min(status["kv_capacity_tokens"] for status in after)
        assert fullest == pytest.approx(planned, rel=0.01)

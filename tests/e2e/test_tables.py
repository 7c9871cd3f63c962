"""`--sidp-pool all`: embedding and LM head too have one copy per group, and nothing else changes.

Tables of several pieces, tied and untied; prompt logprobs and penalties as plain SGLang has them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e.test_parity import NEW_TOKENS, PROMPTS, SETTINGS
from tests.support.checkpoints import write_checkpoint
from tests.support.disturbances import Disturbances, disturbed
from tests.support.engines import answer, engine, statuses

pytestmark = pytest.mark.thorough  # test_quantised has tables, too
LOGPROB_TOLERANCE = 1e-5
NUM_LAYERS, HIDDEN, VOCAB = 6, 64, 1500
PENALISED = {"temperature": 0, "max_new_tokens": 12, "frequency_penalty": 0.7}


class Case(NamedTuple):
    tied: bool
    mode: str = "auto"
    dp_size: int = 2


CASES = [Case(True), Case(False), Case(False, "was", 3), Case(True, "was")]


@pytest.fixture(
    scope="module",
    params=CASES,
    ids=lambda case: "-".join(map(str, case)),
)
def pooled(
    request: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Case, list[Any], Any]]:
    case = request.param
    path: Path = tmp_path_factory.mktemp("checkpoints") / "model"
    write_checkpoint(
        path,
        "qwen3" if case.tied else "llama",
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        tie_embeddings=case.tied,
    )
    with engine(path, **SETTINGS) as running:
        expected = [everything(running, prompt, None) for prompt in PROMPTS]
        memory = running.get_server_info()["internal_states"][0]["memory_usage"]
    disturbances = Disturbances(switch_every=3) if case.mode == "auto" else Disturbances()
    with (
        disturbed(disturbances),
        engine(
            path,
            dp_size=case.dp_size,
            sidp=True,
            sidp_mode=case.mode,
            sidp_pool="all",
            sidp_cache_slots=1,
            **SETTINGS,
        ) as running,
    ):
        yield case, [expected, memory["token_capacity"]], running


def everything(running: Any, prompt: list[int], rank: int | None) -> tuple[Any, ...]:
    where = {} if rank is None else {"routed_dp_rank": rank}
    penalised = running.generate(input_ids=prompt, sampling_params=PENALISED, **where)
    prompted = running.generate(
        input_ids=prompt,
        sampling_params={"temperature": 0, "max_new_tokens": 2},
        return_logprob=True,
        logprob_start_len=0,
        **where,
    )
    logprobs = [value for value, *_ in prompted["meta_info"]["input_token_logprobs"][1:]]
    return answer(running, prompt, NEW_TOKENS, rank), penalised["output_ids"], logprobs


def test_tables_in_the_pool_change_nothing(pooled: tuple[Case, list[Any], Any]) -> None:
    case, (expected, kv_tokens), running = pooled
    tolerance = 0.0 if case.mode == "was" else LOGPROB_TOLERANCE
    for rank in range(case.dp_size):
        for prompt, (plain, penalised, logprobs) in zip(PROMPTS, expected, strict=True):
            got, got_penalised, got_logprobs = everything(running, prompt, rank)
            assert got.token_ids == plain.token_ids and got_penalised == penalised
            assert got.logprobs == pytest.approx(plain.logprobs, abs=tolerance)
            assert got_logprobs == pytest.approx(logprobs, abs=tolerance)
    table_bytes = -(-VOCAB // 64) * 64 * HIDDEN * 2
    for status in statuses(running):
        assert status["pool"] == "all"
        # Norms and the rotary table stay: less than one of the tables.
        assert status["replicated_bytes"] < table_bytes
        assert status["kv_capacity_tokens"] > kv_tokens
        assert status["was"]["fetches"] > 0
        assert (status["cas"]["rows_sent"] > 0) == (case.mode == "auto")
        assert status["cas"]["fallbacks"] == status["cas"]["failed"] == 0

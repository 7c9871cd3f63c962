"""Mixtures of experts give what plain SGLang gives: fetched whole, and called with routed rows.

Beside each equality stand the counters: fetches of experts, rows that owners computed for others.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e.test_parity import NEW_TOKENS, PROMPTS, SETTINGS, Model, Plain, plain_sglang
from tests.support.disturbances import Disturbances, disturbed
from tests.support.engines import answer, engine, statuses

pytestmark = pytest.mark.thorough  # test_quantised has experts, too
LOGPROB_TOLERANCE = 1e-5
NUM_LAYERS = 6
SWITCHES = Disturbances(switch_every=3)


class Case(NamedTuple):
    architecture: str
    mode: str = "auto"
    slots: int | None = None
    pool: str = "ffn"


CASES = [
    Case("qwen3_moe", slots=1, pool="linear"),
    Case("deepseek_v3"),
    Case("qwen3_moe", "was"),
    Case("qwen3_moe", "cas", 1),
    Case("deepseek_v3", "was", 1, "linear"),
    Case("deepseek_v3", "cas", 1),
    Case("deepseek_v2", "was", 1),
    Case("deepseek_v2"),
    Case("mixtral", "was", 1),
    Case("mixtral", pool="linear"),
    Case("qwen2_moe", "was", 1),
    Case("qwen2_moe"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def pooled(request: Any, checkpoints: Path) -> Iterator[tuple[Case, Plain, Any]]:
    case = request.param
    plain = plain_sglang(Model(case.architecture, NUM_LAYERS, False), checkpoints)
    with (
        disturbed(SWITCHES if case.mode == "auto" else Disturbances()),
        engine(
            plain.folder,
            dp_size=2,
            sidp=True,
            sidp_mode=case.mode,
            sidp_pool=case.pool,
            sidp_cache_slots=case.slots,
            **SETTINGS,
        ) as running,
    ):
        yield case, plain, running


def test_single_requests_equal_plain_sglang(pooled: tuple[Case, Plain, Any]) -> None:
    case, plain, running = pooled
    tolerance = 0.0 if case.mode == "was" else LOGPROB_TOLERANCE
    for rank in range(2):
        before = statuses(running)
        for prompt, expected in zip(PROMPTS, plain.answers, strict=True):
            got = answer(running, prompt, NEW_TOKENS, rank)
            assert got.token_ids == expected.token_ids
            assert got.logprobs == pytest.approx(expected.logprobs, abs=tolerance)
        check_mechanism(case, rank, before, statuses(running))
    for status in statuses(running):
        assert status["cache_slots"] == (case.slots or 2)
        assert status["kv_capacity_tokens"] > plain.kv_tokens


def check_mechanism(case: Case, rank: int, before: list[dict], after: list[dict]) -> None:
    """Only `rank` had work."""
    old, new = before[rank], after[rank]
    fetched = NUM_LAYERS - len(new["owned_layers"])
    assert new["placeholders_unmaterialised"] >= 2 * fetched
    assert new["was"]["resyncs"] == 0
    steps = {mode: new["iterations"][mode] - old["iterations"][mode] for mode in ("was", "cas")}
    assert new["was"]["fetches"] - old["was"]["fetches"] >= (steps["was"] - 1) * fetched
    sent = new["cas"]["rows_sent"] - old["cas"]["rows_sent"]
    served = sum(status["cas"]["rows_served"] for status in after)
    assert sent == served - sum(status["cas"]["rows_served"] for status in before)
    assert sent >= steps["cas"] * (fetched - new["cache_slots"])
    assert new["cas"]["fallbacks"] == new["cas"]["failed"] == 0
    assert (steps["cas"] > 20) == (case.mode != "was")

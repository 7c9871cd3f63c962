"""CaS gives the tokens of plain SGLang: alone, in crowds, with aborts, and while modes change.

Beside each equality stand the counters: steps in CaS, rows that owners computed for others.
"""

import asyncio
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sglang

from bench.demo_job import CHECKPOINT
from examples.demo_model.arithmetic import few_shot_header, held_out_problems, solve
from tests.e2e.test_parity import (
    NEW_TOKENS,
    PROMPTS,
    SETTINGS,
    Model,
    check_capacity,
    plain_sglang,
    rows_of,
)
from tests.support.disturbances import Disturbances, disturbed
from tests.support.engines import answer, engine, statuses

LOGPROB_TOLERANCE = 1e-5  # rows of one request alone are computed as they would be locally
NUM_REQUESTS = 80
GIVEN_THRESHOLD = 11  # in mode auto


class Case(NamedTuple):
    model: Model
    dp_size: int
    pool: str
    mode: str
    slots: int
    disturbances: Disturbances = Disturbances()


CASES = [
    pytest.param(Case(Model("llama", 8, False), 2, "linear", "cas", 1), marks=pytest.mark.thorough),
    pytest.param(Case(Model("llama", 8, False), 3, "linear", "cas", 1), marks=pytest.mark.thorough),
    pytest.param(Case(Model("qwen2", 7, True), 4, "ffn", "cas", 3), marks=pytest.mark.thorough),
    pytest.param(
        Case(Model("qwen3", 8, True), 2, "linear", "auto", 2, Disturbances(switch_every=3)),
        marks=pytest.mark.thorough,  # test_tp and test_models have their like
    ),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model.architecture}-{case.mode}")
def test_one_request_at_a_time_equals_plain_sglang(case: Case, checkpoints: Path) -> None:
    plain = plain_sglang(case.model, checkpoints)
    settings = SETTINGS | ({"sidp_batch_threshold": GIVEN_THRESHOLD} if case.mode == "auto" else {})
    with (
        disturbed(case.disturbances),
        engine(
            plain.folder,
            dp_size=case.dp_size,
            sidp=True,
            sidp_mode=case.mode,
            sidp_residency="off",
            sidp_pool=case.pool,
            sidp_cache_slots=case.slots,
            **settings,
        ) as running,
    ):
        for rank in range(case.dp_size):
            if case.mode == "auto":  # before it has learnt from its steps
                answer(running, PROMPTS[0], 4, rank)
                assert statuses(running)[rank]["batch_threshold"] == GIVEN_THRESHOLD
            before = statuses(running)
            for prompt, expected in zip(PROMPTS, plain.answers, strict=True):
                got = answer(running, prompt, NEW_TOKENS, rank)
                assert got.token_ids == expected.token_ids
                assert got.logprobs == pytest.approx(expected.logprobs, abs=LOGPROB_TOLERANCE)
            check_mechanism(case, rank, before, statuses(running))
        check_capacity(plain, statuses(running))
        assert all(status["staging_bytes"] > 0 for status in statuses(running))


def check_mechanism(case: Case, rank: int, before: list[dict], after: list[dict]) -> None:
    """Only `rank` had work: its rows were computed by the others, row for row."""
    layers, units = case.model.num_layers, {"ffn": 1, "linear": 3}[case.pool]
    remote_layers = layers - len(after[rank]["owned_layers"]) - case.slots
    decode_steps = len(PROMPTS) * (NEW_TOKENS - 1)
    cas_steps = after[rank]["iterations"]["cas"] - before[rank]["iterations"]["cas"]
    if case.mode == "cas":
        assert cas_steps >= 0.9 * decode_steps, after[rank]["cas"]
    else:
        assert 0.3 * decode_steps < cas_steps < 0.7 * decode_steps
        assert after[rank]["mode_switches"] >= decode_steps // 3 - 2
    sent = after[rank]["cas"]["rows_sent"] - before[rank]["cas"]["rows_sent"]
    rows = {each * remote_layers * units for each in rows_of(cas_steps)}
    assert sent in rows, "every row of every remote unit, and no more"
    served = sum(new["cas"]["rows_served"] for new in after)
    assert served - sum(old["cas"]["rows_served"] for old in before) == sent
    assert after[rank]["cas"]["fallbacks"] == 0 and after[rank]["was"]["resyncs"] == 0
    assert after[rank]["placeholders_unmaterialised"] > 0


# Many requests on the demo model, which answers right with a margin: batches don't change its
# tokens. That plain SGLang says so too is shown in test_demo_model.


class Request(NamedTuple):
    prompt: str
    max_new_tokens: int
    delay: float  # seconds after the previous one
    is_aborted: bool


def make_requests(seed: int) -> list[Request]:
    random_ = random.Random(seed)
    header = few_shot_header(num_tokens_min=100)
    return [
        Request(
            header + problem if random_.random() < 0.5 else problem,
            random_.choice([4, 20, 96]),
            random_.expovariate(30.0),
            random_.random() < 0.15,
        )
        for problem, _ in held_out_problems(NUM_REQUESTS)
    ]


def run(running: sglang.Engine, requests: list[Request]) -> list[str | None]:
    """Texts of the requests that were not aborted."""

    async def one(request: Request, number: int) -> str | None:
        name = f"request-{number}"
        task = asyncio.ensure_future(
            running.async_generate(
                request.prompt,
                {"temperature": 0, "max_new_tokens": request.max_new_tokens},
                rid=name,
            )
        )
        if not request.is_aborted:
            return (await task)["text"]
        await asyncio.sleep(0.05)
        running.tokenizer_manager.abort_request(name)
        await asyncio.wait_for(task, 60)
        return None

    async def everything() -> list[str | None]:
        tasks = []
        for number, request in enumerate(requests):
            await asyncio.sleep(request.delay)
            tasks.append(asyncio.ensure_future(one(request, number)))
        return await asyncio.wait_for(asyncio.gather(*tasks), 300)

    return running.loop.run_until_complete(everything())


@pytest.mark.parametrize(
    "mode,disturbances",
    [
        pytest.param("cas", Disturbances(), marks=pytest.mark.thorough),
        ("auto", Disturbances(switch_every=4, decline=0.1, delay=0.05, delay_ms=20, seed=3)),
    ],
)
def test_many_requests_with_aborts_give_the_right_texts(
    mode: str, disturbances: Disturbances
) -> None:
    requests = make_requests(1)
    with (
        disturbed(disturbances),
        engine(CHECKPOINT, dp_size=4, sidp=True, sidp_mode=mode, sidp_residency="off") as running,
    ):
        texts = run(running, requests)
        states = statuses(running)
    assert texts == [
        None if request.is_aborted else solve(request.prompt)[: request.max_new_tokens]
        for request in requests
    ]
    check_group(states)
    if disturbances.switch_every:
        assert all(state["mode_switches"] > 0 for state in states)
        assert sum(state["mode_switches"] for state in states) > 20
        assert all(state["mode_switch_reasons"].keys() == {"forced"} for state in states)
        given = [state["cas"]["declines_given"].get("disturbed", 0) for state in states]
        assert sum(given) > 0
    else:
        assert sum(state["cas"]["fused_gemms"] for state in states) > 0


def check_group(states: list[dict[str, Any]]) -> None:
    """All ranks ran CaS steps, and everything that was sent was served once. How many steps a rank
    gets depends on where the requests go."""
    steps = [state["iterations"]["cas"] for state in states]
    assert min(steps) > 0 and sum(steps) > 20, steps
    sent = sum(state["cas"]["rows_sent"] for state in states)
    assert sum(state["cas"]["rows_served"] for state in states) == sent > 0
    assert all(state["cas"]["failed"] == 0 for state in states)
    assert all(state["cas"]["malformed_messages"] == 0 for state in states)

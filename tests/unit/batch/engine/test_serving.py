"""Every line gets one record, whatever is in its body and whatever SGLang's server code raises."""

import asyncio
import io
import logging
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fastapi
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest

from sidp_sgl.batch import engine_process
from sidp_sgl.batch.engine import serving
from sidp_sgl.batch.errors import EngineEnded
from sidp_sgl.batch.files.input import InputFile
from sidp_sgl.batch.files.output import OutputFile
from sidp_sgl.batch.files.request import CHAT, COMPLETIONS, LineError, parse
from sidp_sgl.batch.files.resume import Done
from sidp_sgl.batch.files.streams import NoJournal
from sidp_sgl.batch.job import Job
from sidp_sgl.batch.progress import Progress, Tally
from sidp_sgl.batch.suspects import Suspects
from sidp_sgl.batch.window import Bounds, Window
from sidp_sgl.scheduler.lifecycle.liveness import RankFailure
from tests.support.jobs import records, write_lines
from tests.support.served import STEPS, EngineWithoutRanks, ServedHere, engine_without_ranks

LONGEST_SECONDS = 60.0
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "1+1="},
    CHAT: {"messages": [{"role": "user", "content": "1+1="}]},
}
FIELDS = {
    COMPLETIONS: sorted(CompletionRequest.model_fields),
    CHAT: sorted(ChatCompletionRequest.model_fields),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineWithoutRanks]:
    with engine_without_ranks() as made:
        yield made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest-xdist can't pass on what is logged of half a surrogate pair.
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    monkeypatch.setattr(serving, "_FAILING_SECONDS", 0.01)
    monkeypatch.setattr(serving, "_WATCH_SECONDS", 0.01)
    monkeypatch.setattr(engine_process, "_LAST_MESSAGE_SECONDS", 0.01)


class TooLong(Exception):
    pass


def run_job(
    engine: EngineWithoutRanks, lines: list[dict[str, Any]], window: int = 16
) -> dict[str, dict[str, Any]]:
    """Responses by custom_id, each there once."""
    deadline = time.monotonic() + LONGEST_SECONDS

    def check_time() -> None:
        if time.monotonic() > deadline:
            raise TooLong

    with TemporaryDirectory() as name:
        folder = Path(name)
        input_file = InputFile(write_lines(folder / "in", lines))
        contents = input_file.check()
        done, output = Done(contents.num_lines), OutputFile(folder / "out")
        progress = Progress(Tally(contents.num_requests, 0), io.StringIO())
        window_of = Window(input_file.requests(done.__contains__), Bounds(window), Suspects())
        job = Job(window_of, output, done, progress, NoJournal(), max_restarts=1000)
        job.run(lambda: ServedHere(engine), check_time)
        output.close()
        found = records(folder / "out")
    by_id = {record["custom_id"]: record["response"] for record in found}
    assert len(found) == len(by_id) == len(lines)
    for response in by_id.values():
        assert ("error" in response["body"]) == (response["status_code"] >= 400)
    return by_id


def line(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    body = {"model": "demo", **BODIES[url], **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def message(response: dict[str, Any]) -> str:
    return response["body"]["error"]["message"]


def test_answers(engine: EngineWithoutRanks) -> None:
    engine.on_step = lambda _: None
    found = run_job(engine, [line("a"), line("b", CHAT), line("c", n=3, logprobs=1, echo=True)])
    assert found["a"]["body"]["choices"][0]["text"] == "46"
    assert found["b"]["body"]["choices"][0]["message"]["content"] == "46"
    assert len(found["c"]["body"]["choices"]) == 3


@pytest.mark.parametrize("value", ["json", 7, ["json"], True])
def test_a_validator_that_raises(engine: EngineWithoutRanks, value: Any) -> None:
    """SGLang's take any response_format for an object."""
    lines = [line("a", CHAT), line("b", CHAT, response_format=value), line("c", CHAT)]
    found = run_job(engine, lines)
    assert [found[name]["status_code"] for name in "abc"] == [200, 400, 200]
    assert "AttributeError" in message(found["b"])
    assert found["b"]["body"]["error"]["type"] == "invalid_request_error"


def test_one_rid_for_all(engine: EngineWithoutRanks) -> None:
    """All three are in the engine at a time, where each has an id of its own."""
    engine.on_step = lambda _: None
    found = run_job(engine, [line(name, rid="same") for name in "abc"])
    assert [response["status_code"] for response in found.values()] == [200] * 3
    assert len({response["body"]["id"] for response in found.values()} - {"same"}) == 3


class Panic(BaseException):
    """As PyO3's: Rust code that panics raises no Exception."""


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


FAULTS: list[Callable[[], BaseException]] = [
    *(
        lambda kind=kind: kind("for a reason")  # type: ignore[misc]
        for kind in (
            *(ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError, OSError),
            *(MemoryError, RecursionError, TimeoutError, StopIteration, StopAsyncIteration),
            *(AssertionError, NotImplementedError, asyncio.CancelledError, RankFailure, Panic),
        )
    ),
    lambda: UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    lambda: ValueError("half of a pair: \udc80"),
    lambda: fastapi.HTTPException(503, "busy"),
    lambda: fastapi.HTTPException(418, {"reason": "a teapot"}),  # type: ignore[arg-type]
    Unprintable,
    lambda: SystemExit(1),  # the process ends, and another goes on
]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    faults=st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0, len(FAULTS) - 1)), max_size=20
    ),
    seed=st.integers(0, 1000),
    window=st.integers(1, 20),
)
def test_whatever_is_raised(
    engine: EngineWithoutRanks, faults: list[tuple[str, int]], seed: int, window: int
) -> None:
    left = list(faults)

    def on_step(step: str) -> None:
        if left and left[0][0] == step:
            raise FAULTS[left.pop(0)[1]]()

    engine.on_step = on_step
    urls = random.Random(seed)
    lines = [line(f"r{n}", urls.choice([CHAT, COMPLETIONS])) for n in range(12)]
    found = run_job(engine, lines, window)
    num_errors = sum(response["status_code"] >= 400 for response in found.values())
    assert num_errors <= len(faults) - len(left)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
# What fields take, at and beyond their bounds.
PLAUSIBLE = st.sampled_from(
    [
        *(-1, 0, 1, 2, 3, 63, 64, 1000, 2**31, 2**40, 2**63 - 1, 0.0, 0.5, 1e300, 1e-320, -0.0),
        *("", "a", "(", "auto", "required", "none", "json", "\x00", "é" * 9),
        *([], [""], ["a"], ["x", ""], [0], [3, 5], [-1], [64], [2**63 - 1], [[]], [[3], []]),
        *({}, {"3": 1.0}, {"-1": 1.0}, {"a": 1}, {"type": "json_object"}, {"type": "json_schema"}),
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}},
        {"type": "json_schema", "schema": "a"},
        {"type": "structural_tag", "structures": [], "triggers": []},
        {"type": "function", "function": {"name": "f"}},
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}],
        {"effort": "high", "enabled": "yes"},
        {"chat_template": "{{ 1 / 0 }}"},
        {"id": "x", "rid": "y"},
    ]
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    url = draw(st.sampled_from([CHAT, COMPLETIONS]))
    names = st.sampled_from([*FIELDS[url], "reasoning", "unknown"])
    return url, draw(st.dictionaries(names, PLAUSIBLE | JSON, max_size=4))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(bodies(), min_size=1, max_size=12))
def test_any_fields(engine: EngineWithoutRanks, found: list[tuple[str, dict[str, Any]]]) -> None:
    engine.on_step = lambda _: None
    lines = []
    for number, (url, body) in enumerate(found):
        made = line(f"r{number}", url, **body)
        try:
            parse(1, orjson.dumps(made))
        except LineError:
            continue  # the job does not begin with it
        lines.append(made)
    assert len(run_job(engine, [*lines, line("good")])) == len(lines) + 1


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "body",
    [
        {"top_k": 2**40},
        {"n": 0},
        {"n": -1},
        {"n": 10**9},
        {"min_tokens": 2**40, "max_tokens": 2**41},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [3, 64]},
        {"logprobs": True, "top_logprobs": 65},
        {"logprobs": True, "top_logprobs": -1},
    ],
)
def test_bounds(engine: EngineWithoutRanks, url: str, body: dict[str, Any]) -> None:
    """What would end a rank is refused before it gets there, with the field's name."""
    if url == COMPLETIONS and "top_logprobs" in body:
        body = {"logprobs": body["top_logprobs"]}
    sent = []
    engine.on_step = lambda step: sent.append(step) if step == "dispatch" else None
    response = run_job(engine, [line("a", url, **body)])["a"]
    assert response["status_code"] == 400 and not sent
    assert any(message(response).startswith(name) for name in body)


@pytest.mark.parametrize("prompt", [["x", ""], [[5], []], [5, 64], [[5], [-1]]])
def test_prompts_that_would_end_the_engine_or_mix_up_answers(
    engine: EngineWithoutRanks, prompt: list[Any]
) -> None:
    """Also without --sidp, where nothing else checks them."""
    sent = []
    engine.on_step = lambda step: sent.append(step) if step == "dispatch" else None
    response = run_job(engine, [line("a", prompt=prompt)])["a"]
    assert response["status_code"] == 400 and not sent
    assert "prompt" in message(response)


def test_a_request_that_the_engine_has_lost(
    engine: EngineWithoutRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank has it, and nobody answers: the job does not wait for ever."""

    class Load:
        timestamp = 1.0
        num_running_reqs = num_waiting_reqs = num_used_tokens = 0
        max_total_num_tokens = 10

    class Loads:
        @staticmethod
        def read_all() -> list[Load]:
            return [Load()]

    monkeypatch.setattr(serving, "_LOST_SECONDS", 0.3)
    monkeypatch.setattr(engine.tokenizer_manager, "load_snapshot_reader", Loads)
    handed_out = engine._wait

    async def lose(obj: Any, request: Any = None) -> Any:
        if obj.text == "lost":
            await asyncio.sleep(1000)
        async for answer in handed_out(obj, request):
            yield answer

    monkeypatch.setattr(engine.tokenizer_manager, "_wait_one_response", lose)
    engine.on_step = lambda _: None
    found = run_job(engine, [line("a"), line("b", prompt="lost"), line("c")])
    assert [found[name]["status_code"] for name in "abc"] == [200, 500, 200]
    assert "1 requests got no answer, and no rank has them" in message(found["b"])


def test_an_answer_that_can_not_be_sent_ends_the_engine(
    engine: EngineWithoutRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "ANSWER", "no bytes")
    engine.on_step = lambda _: None
    served = ServedHere(engine)
    try:
        served.send(parse(1, orjson.dumps(line("a"))))
        with pytest.raises(EngineEnded, match="an answer was not sent: TypeError"):
            for _ in range(100):
                served.receive(0.1)
    finally:
        served.close()

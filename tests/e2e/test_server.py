"""SiDP behind SGLang's HTTP server: its own and the OpenAI endpoints, streaming, status; at last
the end of a server that loses a rank."""

import json
import shutil
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.demo_job import CHECKPOINT
from examples.demo_model.arithmetic import few_shot_header, final_answer, held_out_problems
from sidp_sgl.scheduler.status import METRICS, MODE_CODES, VALUES
from tests.support.dashboard import ACCEPT, QUERIES, VARIABLES, exposed, selectors, selects
from tests.support.server import Server
from tests.support.traces import Traces, ranks, traced

HEADER = few_shot_header(num_tokens_min=160)
(PROMPT, ANSWER), *_ = held_out_problems(1)


END_SECONDS = 15.0  # from the kill to the error


@pytest.fixture(scope="module")
def traces() -> Iterator[Traces]:
    with traced(SIDP_CPU_DEVICE_MEMORY="64MiB", PYTHONWARNINGS="ignore") as found:
        yield found


@pytest.fixture(scope="module")
def running(traces: Traces) -> Server:
    server = Server(CHECKPOINT, "--enable-metrics")
    server.wait_until_ready()
    return server


def test_generate(running: Server) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 96}
    body = {"text": HEADER + PROMPT, "sampling_params": sampling}
    text = running.post("/generate", body)["text"]
    assert final_answer(text) == ANSWER
    assert running.stream("/generate", body)[-1]["text"] == text


def test_completions(running: Server) -> None:
    body = {"model": "demo", "prompt": HEADER + PROMPT, "max_tokens": 96, "temperature": 0}
    text = running.post("/v1/completions", body)["choices"][0]["text"]
    assert final_answer(text) == ANSWER
    events = running.stream("/v1/completions", body)
    assert "".join(event["choices"][0]["text"] for event in events) == text


def test_chat_completions(running: Server) -> None:
    messages = [{"role": "user", "content": HEADER + PROMPT}]
    body = {"model": "demo", "messages": messages, "max_tokens": 96, "temperature": 0}
    text = running.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert final_answer(text) == ANSWER
    events = running.stream("/v1/chat/completions", body)
    deltas = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(deltas) == text


def paths(status: dict[str, Any], *path: str) -> Iterator[tuple[str, ...]]:
    for key, value in status.items():
        if isinstance(value, dict) and key not in ("declines_given", "mode_switch_reasons"):
            yield from paths(value, *path, key)
        else:
            yield (*path, key)


def test_server_info_shows_every_rank(running: Server) -> None:
    states = [state["sidp"] for state in running.get("/server_info")["internal_states"]]
    assert sorted(status["dp_rank"] for status in states) == [0, 1]
    for status in states:
        assert set(paths(status)) == {value.path for value in VALUES} | {("members",)}
        assert status["enabled"] and status["mode"] in MODE_CODES
        assert status["owned_bytes"] < status["pooled_bytes"]
        assert status["kv_headroom_tokens"] <= status["kv_capacity_tokens"]


def sidp_series(running: Server) -> dict[tuple[Any, ...], float]:
    """(name, rank, labels of its own) → value."""
    with running.open("/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
    return {
        (sample.name, int(sample.labels["dp_rank"]), sample.labels.get("mode")): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("sglang:sidp_")
    }


def test_metrics_are_the_status_of_every_rank(running: Server) -> None:
    states = [state["sidp"] for state in running.get("/server_info")["internal_states"]]
    steady = [m for m in METRICS if m.path[-1] not in ("sent_messages", "service_share")]
    expected = {
        (metric.series, status["dp_rank"], metric.labels.get("mode")): number
        for status in states
        for metric in steady
        if (number := metric.number(status)) is not None
    }
    deadline = time.monotonic() + 10
    while (series := sidp_series(running)) and time.monotonic() < deadline:
        if expected.items() <= series.items():
            break
        time.sleep(0.5)  # they are published once a second
    assert expected.items() <= series.items(), expected.items() - series.items()
    assert series["sglang:sidp_was_bytes_total", 0, None] > 0


def test_the_dashboard_finds_every_series_whoever_scrapes(running: Server) -> None:
    asked = [selectors(query) for query in [*QUERIES, *VARIABLES]]
    for accept in ACCEPT.values():
        with running.open("/metrics", accept=accept) as response:
            series = exposed(response.read().decode())
        for query in asked:
            assert any(selects(selector, each) for selector in query for each in series), query


def cas_steps(running: Server) -> int:
    states = running.get("/server_info")["internal_states"]
    return sum(state["sidp"]["iterations"]["cas"] for state in states)


def test_the_batch_threshold_can_be_set_meanwhile(running: Server) -> None:
    def change(**values: float) -> list[bool]:
        return running.post("/set_internal_state", {"server_args": values})

    def set_threshold(value: float) -> list[bool]:
        return change(sidp_batch_threshold=value)

    assert change(sidp_residency=0) == [True, True]
    body = {"text": HEADER + PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 96}}
    assert set_threshold(1) == [True, True]
    before = cas_steps(running)
    text = running.post("/generate", body)["text"]
    assert cas_steps(running) == before
    assert set_threshold(65) == [True, True]
    assert running.post("/generate", body)["text"] == text
    assert cas_steps(running) > before
    assert set_threshold(-1) == [False, False]
    assert set_threshold(0) == change(sidp_residency=1) == [True, True]


def test_weight_updates_are_refused(running: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        running.post("/update_weights_from_disk", {"model_path": str(CHECKPOINT)})
    assert caught.value.code == 400
    assert "--sidp" in json.dumps(json.load(caught.value))


EMPTY, TOO_LARGE = "is empty", "which the model does not have"
SAMPLING = {"max_new_tokens": 4}


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/generate", {"text": ["x", ""]}, EMPTY),
        ("/generate", {"text": ""}, EMPTY),
        ("/generate", {"input_ids": [[5, 6], []]}, EMPTY),
        ("/generate", {"input_ids": [5, 10**6]}, TOO_LARGE),
        ("/generate", {"input_ids": [[5], [-1]]}, TOO_LARGE),
        ("/generate", {"input_ids": [5, 10**6], "image_data": "x"}, TOO_LARGE),
        ("/v1/completions", {"prompt": ["x", ""]}, EMPTY),
        ("/v1/completions", {"prompt": [[5, 6], []]}, EMPTY),
        ("/v1/completions", {"prompt": [5, 10**6]}, TOO_LARGE),
        ("/v1/completions", {"prompt": "x", "logprobs": 10**6}, "more than the model has tokens"),
        ("/v1/completions", {"prompt": "x", "top_k": 2**40}, "top_k is"),
    ],
)
def test_what_would_end_a_rank_is_refused_and_nobody_notices(
    running: Server, path: str, body: dict[str, Any], reason: str
) -> None:
    """A neighbour's request runs meanwhile."""
    openai = {"model": "demo", "max_tokens": 4} if path != "/generate" else {}
    native = {} if openai else {"sampling_params": SAMPLING}
    neighbour = {"text": HEADER + PROMPT, "sampling_params": {"temperature": 0}}
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(running.post, "/generate", neighbour)
        with pytest.raises(urllib.error.HTTPError) as caught:
            running.post(path, {**body, **openai, **native})
        assert caught.value.code == 400 and reason in caught.value.read().decode()
        assert final_answer(answer.result()["text"]) == ANSWER


def status_of(running: Server, path: str, body: Any) -> int:
    try:
        with running.open(path, body) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_profile_is_taken_or_refused(running: Server, traces: Traces) -> None:
    folder = traces.folder / "profile"
    for refused in ({"activities": ["MEM"]}, {"output_dir": "/proc/x"}, {"profile_by_stage": True}):
        assert status_of(running, "/start_profile", refused) == 400
    assert status_of(running, "/stop_profile", {}) == 400, "none has begun"
    assert status_of(running, "/start_profile", {"output_dir": str(folder)}) == 200
    running.post("/generate", {"text": PROMPT, "sampling_params": SAMPLING})
    assert status_of(running, "/stop_profile", {}) == 200
    profiles = sorted(folder.iterdir())
    assert [path.name.partition("TP-0-")[2] for path in profiles] == [
        "DP-0.trace.json.gz",
        "DP-1.trace.json.gz",
    ]
    shutil.rmtree(folder)
    running.post("/generate", {"text": PROMPT, "sampling_params": SAMPLING})


def error_of(running: Server, path: str, body: Any) -> tuple[int, str, float]:
    """Status, message and time of the error that answers a request."""
    try:
        with running.open(path, body, timeout=60.0) as response:
            events = [line for line in response if b"error" in line]
            error = json.loads(events[0].removeprefix(b"data: "))["error"]
            return error["code"], error["message"], time.monotonic()
    except urllib.error.HTTPError as response:
        return response.code, json.load(response)["message"], time.monotonic()


def test_a_killed_rank_ends_the_server(running: Server, traces: Traces) -> None:
    traces.processes()
    victim = ranks(running.process.pid)[1]
    victim.suspend()
    sampling = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
    native = {"text": PROMPT, "sampling_params": sampling, "routed_dp_rank": 1}
    openai = {"model": "m", "prompt": PROMPT, "max_tokens": 200, "routed_dp_rank": 1}
    requests = [
        ("/generate", native),
        ("/generate", {**native, "stream": True}),
        ("/v1/completions", openai),
        ("/v1/completions", {**openai, "stream": True}),
        ("/server_info", None),
    ]
    with ThreadPoolExecutor(len(requests)) as threads:
        pending = [threads.submit(error_of, running, *request) for request in requests]
        time.sleep(3.0)
        killed_at = time.monotonic()
        victim.kill()
        for answer in pending:
            status, message, answered_at = answer.result()
            assert status == 503
            assert f"DP rank 1 (pid {victim.pid}) was killed by SIGKILL" in message
            assert answered_at - killed_at < END_SECONDS
    log = running.wait(END_SECONDS)
    assert running.process.returncode == 1
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"DP rank 1 (pid {victim.pid})" in errors[0]
    assert "Traceback" not in log
    traces.assert_nothing_left(2.0)

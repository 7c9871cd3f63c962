"""Failures of an engine with --sidp: every call ends with an error that names the rank, in time,
and nothing stays: no process, no socket, no shared memory.

The test's own process stands for the user's where `sgl.Engine` is used: it has to survive.
"""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import sglang
import transformers

from sidp_sgl.scheduler.lifecycle.liveness import RankFailure
from tests.support.checkpoints import write_checkpoint
from tests.support.server import Server, free_port
from tests.support.traces import Traces, rank_number, ranks, wait_for_ranks

END_SECONDS = 15.0  # from the kill to the error
START_SECONDS = 300.0
SETTINGS = {"device": "cpu", "dp_size": 2, "skip_tokenizer_init": True, "random_seed": 1}
PROMPT = [5, 6, 7, 8]
LONG = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
KILLED = r"DP rank {} \(pid {}\) was killed by SIGKILL while the engine was {}"

SCRIPT = """
import sys, time
import sglang
if __name__ == "__main__":
    engine = sglang.Engine(model_path=sys.argv[1], sidp=True, log_level="error", **{})
    print("up", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", num_layers=4)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traces]:
    monkeypatch.setenv("SIDP_CPU_DEVICE_MEMORY", "16MiB")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    with tempfile.TemporaryDirectory(prefix="traces-") as folder:  # short: sockets lie in it
        found = Traces(monkeypatch, Path(folder))
        yield found
        for process in found.processes():
            process.kill()


def start_engine(model: Path) -> sglang.Engine:
    return sglang.Engine(model_path=str(model), sidp=True, log_level="error", **SETTINGS)


class Killer(threading.Thread):
    """Kills a rank of this process's engine while it starts."""

    def __init__(self, traces: Traces) -> None:
        super().__init__(daemon=True)
        self._traces = traces
        self.start()

    def run(self) -> None:
        self.victim = wait_for_ranks(os.getpid(), 2, START_SECONDS)[1]
        self._traces.processes()
        self.time = time.monotonic()
        self.victim.kill()


@pytest.mark.thorough
def test_rank_killed_while_starting(model: Path, traces: Traces) -> None:
    killer = Killer(traces)
    with pytest.raises(RankFailure) as caught:
        start_engine(model)
    assert time.monotonic() - killer.time < END_SECONDS
    caught.match(KILLED.format("[01]", killer.victim.pid, "starting"))
    traces.assert_nothing_left(0.0)
    assert not traces.new_children()
    gc.collect()  # hangs where the engine's sockets were left open


def test_rank_killed_while_generating(model: Path, traces: Traces) -> None:
    engine = start_engine(model)  # right after a failed start, in the same process
    assert len(engine.generate(input_ids=PROMPT, sampling_params=LONG)["output_ids"]) == 200
    traces.processes()
    victim = next(rank for rank in ranks(os.getpid()) if rank_number(rank) == 1)
    killed_at = 0.0

    async def single() -> Any:
        return await engine.async_generate(input_ids=PROMPT, sampling_params=LONG, routed_dp_rank=1)

    async def batch() -> Any:
        return await engine.async_generate(input_ids=[PROMPT] * 4, sampling_params=LONG)

    async def stream() -> None:
        chunks = await engine.async_generate(
            input_ids=PROMPT, sampling_params=LONG, routed_dp_rank=1, stream=True
        )
        async for _ in chunks:
            victim.suspend()  # in the middle of its answer; nobody gets one from now on

    async def kill() -> None:
        nonlocal killed_at
        await asyncio.sleep(2.0)
        killed_at = time.monotonic()
        victim.kill()

    async def calls() -> list[Any]:
        streamed = asyncio.create_task(stream())
        while victim.status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.01)
        waiting = [streamed, single(), batch(), engine.tokenizer_manager.get_internal_state()]
        return await asyncio.gather(*waiting, kill(), return_exceptions=True)

    *failures, _ = engine.loop.run_until_complete(asyncio.wait_for(calls(), 60.0))
    assert time.monotonic() - killed_at < END_SECONDS
    for failure in failures:
        assert isinstance(failure, RankFailure)
    with pytest.raises(RankFailure, match=KILLED.format(1, victim.pid, "running")):
        engine.get_server_info()
    with pytest.raises(RankFailure):
        engine.generate(input_ids=PROMPT, sampling_params=LONG)
    with pytest.raises(RankFailure):
        next(engine.generate(input_ids=PROMPT, sampling_params=LONG, stream=True))
    traces.assert_nothing_left(0.0)
    assert not traces.new_children()
    engine.shutdown()


def launch(*command: str, **options: Any) -> subprocess.Popen:
    """In a session of its own, as from a terminal: signals to its group reach nobody else."""
    return subprocess.Popen([sys.executable, *command], start_new_session=True, **options)


def launch_server(model: Path, port: int, *arguments: str, **options: Any) -> subprocess.Popen:
    settings = ["--model-path", str(model), "--port", str(port), "--device", "cpu"]
    settings += ["--dp-size", "2", "--skip-tokenizer-init", "--log-level", "error", "--sidp"]
    return launch("-m", "sglang.launch_server", *settings, *arguments, **options)


def error_of(server: Server, path: str, body: Any) -> tuple[int, str, float]:
    """Status, message and time of the error that answers a request."""
    try:
        with server.open(path, body, timeout=60.0) as response:
            events = [line for line in response if b"error" in line]
            status, error = 200, json.loads(events[0].removeprefix(b"data: "))["error"]
            return error["code"], error["message"], time.monotonic()
    except urllib.error.HTTPError as response:
        status, error = response.code, json.load(response)
        return status, error["message"], time.monotonic()


def test_server_with_a_killed_rank(model: Path, traces: Traces) -> None:
    port = free_port()
    process = launch_server(model, port, stderr=subprocess.PIPE, text=True)
    server = Server(process, port)
    server.wait_until_ready()
    traces.processes()
    victim = next(rank for rank in ranks(process.pid) if rank_number(rank) == 1)
    victim.suspend()
    native = {"input_ids": PROMPT, "sampling_params": LONG, "routed_dp_rank": 1}
    openai = {"model": "m", "prompt": PROMPT, "max_tokens": 200, "routed_dp_rank": 1}
    requests = [
        ("/generate", native),
        ("/generate", {**native, "stream": True}),
        ("/v1/completions", openai),
        ("/v1/completions", {**openai, "stream": True}),
        ("/server_info", None),
    ]
    with ThreadPoolExecutor(len(requests)) as threads:
        pending = [threads.submit(error_of, server, *request) for request in requests]
        time.sleep(3.0)
        killed_at = time.monotonic()
        victim.kill()
        for answer in pending:
            status, message, answered_at = answer.result()
            assert status == 503
            assert f"DP rank 1 (pid {victim.pid}) was killed by SIGKILL" in message
            assert answered_at - killed_at < END_SECONDS
    _, log = process.communicate(timeout=END_SECONDS)
    assert process.returncode == 1
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"DP rank 1 (pid {victim.pid})" in errors[0]
    assert "Traceback" not in log
    traces.assert_nothing_left(2.0)


def test_server_on_sigterm(model: Path, traces: Traces) -> None:
    port = free_port()
    process = launch_server(model, port)
    Server(process, port).wait_until_ready()
    traces.processes()
    process.terminate()
    assert process.wait(60.0) == 0
    traces.assert_nothing_left(2.0)


@pytest.mark.thorough
def test_ctrl_c_while_the_server_starts(model: Path, traces: Traces) -> None:
    process = launch_server(model, free_port(), stderr=subprocess.PIPE, text=True)
    wait_for_ranks(process.pid, 2, START_SECONDS)
    traces.processes()
    os.killpg(process.pid, signal.SIGINT)  # to the whole group, as a terminal does
    _, log = process.communicate(timeout=END_SECONDS)
    assert process.returncode != 0
    assert "error: " not in log  # no rank has failed
    traces.assert_nothing_left(END_SECONDS)


def test_main_process_killed_while_starting(model: Path, traces: Traces) -> None:
    script = traces.folder / "script.py"
    script.write_text(SCRIPT.format(SETTINGS))
    process = launch(str(script), str(model))
    wait_for_ranks(process.pid, 2, START_SECONDS)
    traces.processes()
    process.kill()
    process.wait()
    script.unlink()
    traces.assert_nothing_left(END_SECONDS)


@pytest.mark.thorough
def test_a_model_that_can_not_be_pooled(traces: Traces, tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    process = launch_server(tmp_path, free_port(), stderr=subprocess.PIPE, text=True)
    wait_for_ranks(process.pid, 2, START_SECONDS)
    traces.processes()
    _, log = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 1
    (error,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "DP rank" in error and "mixture of experts" in error
    assert "Traceback" not in log
    traces.assert_nothing_left(2.0)

"""An engine with --sidp that is ended from outside or can not start: an error that says why, and
nothing stays: no process, no socket, no shared memory."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sglang

from sidp_sgl.scheduler.lifecycle.liveness import RankFailure
from tests.support.checkpoints import write_checkpoint
from tests.support.disturbances import Disturbances, disturbed
from tests.support.server import START_SECONDS, Server
from tests.support.traces import Traces, traced, wait_for_ranks

END_SECONDS = 15.0  # from the kill to the error
IMPORT_SECONDS = 60.0  # until a rank that has just begun to import ends with its main process
SETTINGS = {"device": "cpu", "dp_size": 2, "skip_tokenizer_init": True, "random_seed": 1}

SCRIPT = """
import sys, time
import sglang
if __name__ == "__main__":
    engine = sglang.Engine(model_path=sys.argv[1], sidp=True, log_level="error", **{})
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", num_layers=4)


@pytest.fixture
def traces() -> Iterator[Traces]:
    with traced(SIDP_CPU_DEVICE_MEMORY="16MiB", PYTHONWARNINGS="ignore") as found:
        yield found


def start_engine(model: Path, **keywords: str) -> sglang.Engine:
    settings = {**SETTINGS, **keywords}
    return sglang.Engine(model_path=str(model), sidp=True, log_level="error", **settings)


class Killer(threading.Thread):
    """Looks at this process's engine while it starts, and kills a rank of it."""

    def __init__(self, traces: Traces, num_processes: int = 2, *, kills: bool = True) -> None:
        super().__init__(daemon=True)
        self._kills = kills
        self._traces = traces
        self._num_processes = num_processes
        self.start()

    def run(self) -> None:
        self.victim = wait_for_ranks(os.getpid(), self._num_processes, START_SECONDS)[-1]
        self._traces.processes()
        self.time = time.monotonic()
        if self._kills:
            self.victim.kill()


@pytest.mark.thorough
def test_rank_killed_while_starting(model: Path, traces: Traces) -> None:
    killer = Killer(traces)
    with pytest.raises(RankFailure) as caught:
        start_engine(model)
    assert time.monotonic() - killer.time < END_SECONDS
    pid = killer.victim.pid
    caught.match(rf"DP rank [01] \(pid {pid}\) was killed by SIGKILL while the engine was starting")
    traces.assert_nothing_left(0.0)
    assert not traces.new_children()
    gc.collect()  # hangs where the engine's sockets were left open
    engine = start_engine(model)  # right after, in the same process
    assert engine.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 4})
    engine.shutdown()


def test_a_wrong_byte_ends_the_start(model: Path, traces: Traces) -> None:
    """Blocks of rank 1 arrive with one at rank 0."""
    killer = Killer(traces, kills=False)
    with disturbed(Disturbances(wrong_owner=1)), pytest.raises(RankFailure) as caught:
        start_engine(model)
    killer.join()
    caught.match(
        "^DP rank 0 failed while the engine was starting: --sidp-self-check: block 1 of DP rank 1 "
        r"has other bytes at DP rank 0 than at its owner \(fetched into its slot; 1 more\): .*$"
    )
    assert len(str(caught.value).splitlines()) == 1
    traces.assert_nothing_left(END_SECONDS)


@pytest.mark.thorough
def test_without_the_self_check_nobody_sees_a_wrong_byte(model: Path) -> None:
    with traced(SIDP_CPU_DEVICE_MEMORY="16MiB"), disturbed(Disturbances(wrong_owner=1)):
        engine = start_engine(model, sidp_self_check="off")
        states = engine.get_server_info()["internal_states"]
        assert [state["sidp"]["self_check"]["blocks"] for state in states] == [0, 0]
        engine.shutdown()


@pytest.mark.thorough
def test_server_on_sigterm(model: Path, traces: Traces) -> None:
    server = Server(model, "--skip-tokenizer-init")
    server.wait_until_ready()
    traces.processes()
    server.process.terminate()
    server.wait(60.0)
    assert server.process.returncode == 0
    traces.assert_nothing_left(2.0)


@pytest.mark.thorough
def test_ctrl_c_while_the_server_starts(model: Path, traces: Traces) -> None:
    server = Server(model, "--skip-tokenizer-init")
    wait_for_ranks(server.process.pid, 2, START_SECONDS)
    traces.processes()
    os.killpg(server.process.pid, signal.SIGINT)  # to the whole group, as a terminal does
    log = server.wait(END_SECONDS)
    assert server.process.returncode != 0
    assert "error: " not in log  # no rank has failed
    traces.assert_nothing_left(END_SECONDS)


def test_main_process_killed_while_starting(model: Path, traces: Traces) -> None:
    script = traces.folder / "script.py"
    script.write_text(SCRIPT.format(SETTINGS))
    process = subprocess.Popen([sys.executable, script, model], start_new_session=True)
    wait_for_ranks(process.pid, 2, START_SECONDS)
    traces.processes()
    process.kill()
    process.wait()
    script.unlink()
    traces.assert_nothing_left(IMPORT_SECONDS)


@pytest.mark.thorough
def test_a_script_without_the_main_guard(model: Path, traces: Traces) -> None:
    script = traces.folder / "script.py"
    lines = SCRIPT.format(SETTINGS).replace('if __name__ == "__main__":', "if True:")
    script.write_text(lines)
    command = [sys.executable, script, model]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = process.communicate(timeout=START_SECONDS)[1]
    assert process.returncode == 1
    assert (
        log.startswith("error: the script starts the engine outside of")
        and len(log.splitlines()) == 1
    ), log
    script.unlink()
    assert not traces.left()


@pytest.mark.thorough
def test_a_checkpoint_that_can_not_be_loaded(traces: Traces, tmp_path: Path) -> None:
    """Its tensors have other shapes than its config says."""
    write_checkpoint(tmp_path, "llama", num_layers=2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    server = Server(tmp_path, "--skip-tokenizer-init")
    wait_for_ranks(server.process.pid, 2, START_SECONDS)
    traces.processes()
    log = server.wait(START_SECONDS)
    assert server.process.returncode == 1
    (error,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "DP rank" in error
    traces.assert_nothing_left(2.0)

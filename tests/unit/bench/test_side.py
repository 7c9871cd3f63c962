"""A bench's engines are processes that measure the tree they are told to, and leave nothing."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bench.side import ROOT, Side

# SGLang as far as a bench uses it, without its imports and its ranks: one child, one semaphore.
SGLANG = """
import asyncio, multiprocessing, os, time, types

def hold(name):
    open(name, "w").close()
    lock = multiprocessing.get_context("spawn").Lock()
    time.sleep(600)

class Engine:
    def __init__(self, fails=False, hangs=False, **keywords):
        self.port_args = types.SimpleNamespace(instance_id=f"bench-test-{os.getpid()}")
        started = os.environ["STARTED"]
        child = multiprocessing.get_context("spawn").Process(target=hold, args=(started,))
        child.start()
        while not os.path.exists(started):
            time.sleep(0.01)
        time.sleep(0.1)
        if fails:
            raise ValueError("no such model")
        if hangs:
            time.sleep(600)
        self.child, self.loop = child, asyncio.new_event_loop()
        self.tokenizer_manager = types.SimpleNamespace(set_internal_state=self.update)

    async def update(self, request):
        return [True, request.server_args["sidp_batch_threshold"] < 10]

    async def async_generate(self, input_ids, sampling_params, routed_dp_rank):
        await asyncio.sleep(sampling_params["seconds"])
        if not input_ids:
            raise ValueError("an empty prompt")
        about = dict(completion_tokens=2, prompt_tokens=len(input_ids), cached_tokens=0)
        return {"output_ids": [routed_dp_rank, *input_ids], "meta_info": about}

    def get_server_info(self):
        return {"internal_states": [{"sidp": {"dp_rank": rank}} for rank in (1, 0)]}

    def flush_cache(self): ...

    def shutdown(self):
        self.child.kill()
"""
MODULES = {
    "sglang/__init__.py": SGLANG,
    "sglang/srt/__init__.py": "",
    "sglang/srt/managers/__init__.py": "",
    "sglang/srt/managers/io_struct.py": """
        class SetInternalStateReq:
            def __init__(self, server_args):
                self.server_args = server_args
        """,
    "sglang/srt/managers/load_snapshot.py": """
        import types

        class ShmLoadSnapshotReader:
            def __init__(self, path, num_ranks):
                self.ranks = [types.SimpleNamespace(num_running_reqs=1)] * num_ranks

            def read_all(self):
                return self.ranks

        def shm_path_for(name):
            return f"/dev/shm/{name}.shm"
        """,
    "sidp_sgl/__init__.py": "",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in MODULES.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path / "tree"


def start(tree: Path, **keywords: object) -> Side:
    environment = {"STARTED": str(tree / "started")}
    return Side("test", environment, {"dp_size": 2, **keywords}, 30.0, tree)


def processes(tree: Path) -> list[psutil.Process]:
    """Those that have this tree in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(tree / "started") in process.environ().get("STARTED", ""):
                found.append(process)
        except psutil.Error:
            continue
    return found


def semaphores(pids: list[int]) -> list[Path]:
    return [path for pid in pids for path in Path("/dev/shm").glob(f"sem.sidp-bench-{pid}-*")]


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_jobs_states_and_errors(tree: Path) -> None:
    with start(tree) as side:
        pids = [process.pid for process in processes(tree)]
        assert semaphores(pids)
        result = side.run([[5], [6, 7]], {"seconds": 0.05}, ranks=[0, 1])
        assert result.outputs == [[0, 5], [1, 6, 7]]
        assert (result.output_tokens, result.prompt_tokens, result.hit_rate) == (4, 3, 0)
        assert 0.05 <= result.seconds < 5
        with pytest.raises(RuntimeError, match="an empty prompt"):
            side.run([[]], {"seconds": 0})
        assert [state["sidp"]["dp_rank"] for state in side.states()] == [0, 1]
        side.update(sidp_batch_threshold=9)
        with pytest.raises(RuntimeError, match="refused"):
            side.update(sidp_batch_threshold=10)
    assert eventually(lambda: not processes(tree))
    assert not semaphores(pids)


def test_an_engine_that_does_not_start(tree: Path) -> None:
    with pytest.raises(RuntimeError, match="no such model"), start(tree, fails=True):
        pass
    assert eventually(lambda: not processes(tree))


def test_an_engine_of_another_tree(tree: Path, tmp_path: Path) -> None:
    (tree / "sidp_sgl").rename(tmp_path / "sidp_sgl")
    with pytest.raises(RuntimeError, match="which is not of"), start(tree):
        pass
    assert eventually(lambda: not processes(tree))


BENCH = """
import sys
from pathlib import Path
from tests.unit.bench.test_side import start
with start(Path(sys.argv[1]), hangs=sys.argv[2] == "starts") as side:
    side.run([[1]], {"seconds": 600})
"""


@pytest.mark.parametrize("moment", ["starts", "runs"])
def test_a_bench_that_is_killed_leaves_nothing(tree: Path, moment: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    bench = subprocess.Popen(
        [sys.executable, "-c", BENCH, str(tree), moment], env=environment, start_new_session=True
    )
    try:
        assert eventually(lambda: (tree / "started").exists())
        assert eventually(lambda: bool(semaphores([p.pid for p in processes(tree)])))
        pids = [process.pid for process in processes(tree)]
    finally:
        os.killpg(bench.pid, signal.SIGKILL)
        bench.wait()
    assert eventually(lambda: not processes(tree))
    assert not semaphores(pids)


APART = """
import os, subprocess, sys, time
from bench.offline import apart

def main():
    engine = subprocess.Popen(["sleep", "300"])
    print(os.getpid(), engine.pid, flush=True)
    if sys.argv[1] == "killed":
        time.sleep(300)
    engine.kill()
    return 3

sys.exit(apart(main))
"""


def run_apart(how: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    process = subprocess.Popen(
        [sys.executable, "-c", APART, how], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_runs_apart_ends_with_its_process(number: signal.Signals) -> None:
    process, processes = run_apart("killed")
    assert len(processes) == 2
    process.send_signal(number)
    assert process.wait(20) == -number
    assert eventually(lambda: not any(each.is_running() for each in processes))


def test_what_runs_apart_says_how_it_ended() -> None:
    process, _ = run_apart("ends")
    assert process.wait(20) == 3

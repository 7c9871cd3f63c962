"""The janitor leaves nothing of an engine, whichever way its main process ends."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sidp_sgl.scheduler.lifecycle import janitor
from sidp_sgl.scheduler.lifecycle.janitor import MARK, Janitor, find_processes

# An engine's main process: starts a janitor and a marked process, then does as it is told.
MAIN = """
import os, subprocess, sys, time
from sidp_sgl.scheduler.lifecycle.janitor import MARK, Janitor

group, end = sys.argv[1:]
engine = Janitor(group)
(engine.directory / "socket").touch()
for segment in (f"sglang_loads_{group}_1234.shm", f"sem.sidp-{group}-abc"):
    open(f"/dev/shm/{segment}", "w").close()
subprocess.Popen(["sleep", "300"], env={**os.environ, MARK: group})
if end == "fork" and os.fork() == 0:
    os.setsid()  # the child of a fork: it holds the pipe and outlives its parent for a while
    time.sleep(20)
    os._exit(0)
print(engine.directory, flush=True)
if end == "exit":
    raise SystemExit
time.sleep(300)
"""


@pytest.fixture
def group() -> Iterator[str]:
    name = uuid.uuid4().hex[:12]
    yield name
    janitor.clean(name, str(Path(tempfile.gettempdir(), f"sidp-{name}")))


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def marked_process(group: str) -> subprocess.Popen:
    process = subprocess.Popen(["sleep", "300"], env={**os.environ, MARK: group})
    wait_until(lambda: process.pid in find_processes(group))  # it has passed its exec
    return process


def segments(group: str) -> list[Path]:
    return list(Path("/dev/shm").glob(f"*{group}*"))


def janitor_processes(group: str) -> list[psutil.Process]:
    commands = [(process, _command(process)) for process in psutil.process_iter()]
    return [p for p, command in commands if group in command and janitor.__file__ in command]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_close_ends_everything_before_it_returns(group: str) -> None:
    engine = Janitor(group)
    (engine.directory / "socket").touch()
    Path(f"/dev/shm/sglang_loads_{group}_1.shm").touch()
    process, other = marked_process(group), subprocess.Popen(["sleep", "300"])
    try:
        engine.close()
        assert process.poll() == -signal.SIGKILL
        assert other.poll() is None
        assert not engine.directory.exists()
        assert not segments(group)
        assert not janitor_processes(group)
        engine.close()  # once more does no harm
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("end", ["kill", "terminate", "interrupt", "exit", "fork"])
def test_works_however_the_main_process_ends(group: str, end: str) -> None:
    main = subprocess.Popen(
        [sys.executable, "-c", MAIN, group, end], stdout=subprocess.PIPE, text=True
    )
    assert main.stdout is not None
    directory = Path(main.stdout.readline().strip())
    assert directory.name == f"sidp-{group}"
    if end in ("kill", "fork"):
        main.kill()
    elif end == "terminate":
        main.terminate()
    elif end == "interrupt":
        main.send_signal(signal.SIGINT)
    main.wait()
    wait_until(lambda: not janitor_processes(group))
    assert not find_processes(group)
    assert not directory.exists()
    assert not segments(group)


def test_is_no_child_and_survives_the_terminal(group: str) -> None:
    engine = Janitor(group)
    (process,) = janitor_processes(group)
    assert process not in psutil.Process().children(recursive=True)
    assert os.getsid(process.pid) != os.getsid(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    time.sleep(0.1)
    assert process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    engine.close()


def test_waits_for_processes_that_start_more(group: str) -> None:
    engine = Janitor(group)
    command = "while true; do sleep 0.01 & done"
    subprocess.Popen(["sh", "-c", command], env={**os.environ, MARK: group})
    wait_until(lambda: len(find_processes(group)) > 3)
    engine.close()
    assert not find_processes(group)


def test_a_process_in_the_middle_of_its_exec_is_found_a_little_later(
    group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, scans = marked_process(group), iter([[], []])
    monkeypatch.setattr(janitor, "_QUIET_SECONDS", 1.0)
    monkeypatch.setattr(janitor, "find_processes", lambda name: next(scans, find_processes(name)))
    janitor.kill_processes(group)
    assert process.poll() == -signal.SIGKILL


def test_sweep_removes_what_a_crash_left_and_nothing_else(tmp_path: Path) -> None:
    groups = {name: uuid.uuid4().hex[:12] for name in ("stale", "used", "young")}
    directories = {name: tmp_path / f"sidp-{group}" for name, group in groups.items()}
    for name, directory in directories.items():
        directory.mkdir()
        lock_file = directory / "janitor.lock"
        lock_file.touch()
        if name != "young":
            os.utime(lock_file, (0, 0))
    Path(f"/dev/shm/sglang_loads_{groups['stale']}_1.shm").touch()
    (tmp_path / "sidp-results").mkdir()  # the user's own
    lock = janitor._lock(str(directories["used"]))
    janitor.sweep(str(tmp_path))
    os.close(lock)
    left = sorted(path.name for path in tmp_path.iterdir())
    expected = [directories["used"].name, directories["young"].name, "sidp-results"]
    assert left == sorted(expected)
    assert not segments(groups["stale"])


def test_long_temporary_paths_fall_back_to_tmp(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_path = tmp_path / ("x" * 80)
    long_path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long_path))
    engine = Janitor(group)
    assert engine.directory.parent == Path("/tmp")
    engine.close()

"""What the processes of a test leave on the machine: processes, files, shared memory."""

import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest

from tests.support.forked import MARK, TITLE


class Traces:
    """Everything started meanwhile carries a mark, and has its temporary files in one place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self._mark = uuid.uuid4().hex
        self._segments: set[Path] = set()
        self._has_looked = False
        resource_tracker.ensure_running()  # multiprocessing's own; stays with this process
        self._children_before = psutil.Process().children()
        monkeypatch.setenv(MARK, self._mark)
        monkeypatch.setenv("SPT_NOENV", "1")  # setproctitle would write over the mark
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.delenv("CUDA_TILE_TEMP_DIR", raising=False)  # of an engine before
        monkeypatch.setattr(tempfile, "tempdir", None)

    def processes(self) -> list[psutil.Process]:
        """All that run; also remembers their shared memory."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) != self._mark:
                    continue
                found.append(process)
                mapped = [Path(entry.path) for entry in process.memory_maps()]
                self._segments.update(p for p in mapped if p.parent == Path("/dev/shm"))
            except psutil.Error:
                continue  # gone meanwhile, or another user's
        self._has_looked |= bool(found)
        return found

    def new_children(self) -> list[psutil.Process]:
        """Children of this process that were not there before, zombies included."""
        return [c for c in psutil.Process().children() if c not in self._children_before]

    def left(self) -> list[object]:
        """Processes, segments, sockets and files that are still there."""
        # Unlike rglob, walk does not mind folders that go meanwhile.
        walk = os.walk(self.folder)
        files = [Path(top, name) for top, _, names in walk for name in names if not _is_kept(top)]
        segments = [path for path in self._segments if path.exists()]
        return [*self.processes(), *segments, *files]

    def assert_nothing_left(self, seconds: float) -> None:
        assert self._has_looked, "the test has not looked while the engine ran"
        deadline = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, left


def _is_kept(folder: str) -> bool:
    """The cache of PyTorch's compiler, which SGLang uses with tensor parallelism."""
    return "/torchinductor_" in folder


@contextmanager
def traced(**environment: str) -> Iterator[Traces]:
    """Of what is started inside, with `environment`; what still runs at the end is killed."""
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        tempfile.TemporaryDirectory(prefix="traces-") as folder,  # short: sockets lie in it
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        traces = Traces(monkeypatch, Path(folder))
        try:
            yield traces
        finally:
            for process in traces.processes():
                process.kill()


def wait_for_ranks(main_pid: int, number: int, seconds: float) -> list[psutil.Process]:
    """Until that many rank processes exist; they still import then and have no names."""
    deadline = time.monotonic() + seconds
    while len(found := _grandchildren(main_pid)) < number:
        assert time.monotonic() < deadline, f"{found} after {seconds:.0f} s"
        assert psutil.pid_exists(main_pid), "the main process has ended"
        time.sleep(0.1)
    return found


def ranks(main_pid: int) -> dict[int, psutil.Process]:
    """Those of an engine's main process that have their names, by DP rank; with TP their TP rank
    0."""
    return {dp: process for (dp, tp), process in members(main_pid).items() if tp == 0}


def members(main_pid: int) -> dict[tuple[int, int], psutil.Process]:
    """By DP and TP rank, of the names `sglang::scheduler_DP1` or `sglang::scheduler_DP1_TP0`."""
    found = {}
    for process in _grandchildren(main_pid):
        with suppress(psutil.NoSuchProcess):  # gone meanwhile, or dead and still listed
            name = "".join(process.cmdline()[:1])
            if match := re.fullmatch(r"sglang::scheduler_DP(\d+)(?:_TP(\d+))?", name):
                found[int(match[1]), int(match[2] or 0)] = process
    return dict(sorted(found.items()))


def _grandchildren(pid: int) -> list[psutil.Process]:
    """Ranks are the only processes below an engine's main process that are not its children."""
    try:
        below = psutil.Process(pid).children(recursive=True)
        return [p for p in below if p.ppid() != pid and p.cmdline()[:1] != [TITLE]]
    except psutil.NoSuchProcess:
        return []

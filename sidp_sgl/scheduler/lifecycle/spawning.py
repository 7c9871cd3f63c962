"""What an engine's processes inherit when the main process starts them: marks to find them by.

Room: scheduler. The marks are in this process's environment only for that moment, so that no
other child of the user's carries them.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from sidp_sgl.scheduler.lifecycle.janitor import MARK, SEMAPHORE_PREFIX

_own_tracker: int | None = None  # process id of a resource tracker that an engine has started
DIRECTORY = "SIDP_DIRECTORY"  # environment variable: where the engine's sockets are


@contextmanager
def marked(group: str, directory: Path) -> Iterator[None]:
    """Processes started inside, and theirs, belong to `group`."""
    marks = {
        MARK: group,
        DIRECTORY: str(directory),
        "SPT_NOENV": "1",  # setproctitle would write over the environment that holds the mark
        # cuda.tile makes a temporary directory per process, which a killed process leaves.
        "CUDA_TILE_TEMP_DIR": os.environ.get("CUDA_TILE_TEMP_DIR", str(directory)),
        # joblib, which comes with scikit-learn, would rename the semaphores that are found by name.
        "JOBLIB_MULTIPROCESSING": "0",
    }
    before = {name: os.environ.get(name) for name in marks}
    # Named semaphores of a killed process stay: under this name they are found.
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    prefix = config["semprefix"]
    _start_tracker()  # before: the user's own children share it, so it gets no mark
    # A terminal sends Ctrl-C to all processes; what it means is for the main process to decide.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ.update(marks)
    config["semprefix"] = SEMAPHORE_PREFIX.format(group=group)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        config["semprefix"] = prefix
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _start_tracker() -> None:
    """multiprocessing's resource tracker, one for all children of this process."""
    global _own_tracker
    before = _tracker()._pid
    resource_tracker.ensure_running()
    if _tracker()._pid != before:
        _own_tracker = _tracker()._pid


def stop_own_tracker() -> None:
    """End the resource tracker where an engine has started it and nothing uses it any more.

    At once, not by closing it: it would warn of the semaphores that the janitor has removed.
    """
    pid = _tracker()._pid
    if pid is not None and pid == _own_tracker and not multiprocessing.active_children():
        os.kill(pid, signal.SIGKILL)
        _tracker()._stop()


def _tracker() -> Any:
    return resource_tracker._resource_tracker  # type: ignore[attr-defined]

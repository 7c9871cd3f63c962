"""Removes what an engine leaves behind: its processes, its directory, its shared memory.

Room: scheduler. Imports the standard library only, for it is a program too: one small process per
engine that outlives the engine's main process and cleans up after it, however it ended.
"""

import fcntl
import glob
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

MARK = "SIDP_GROUP"  # environment variable that every process of an engine carries
SEMAPHORE_PREFIX = "/sidp-{group}"
_SEGMENTS = ("/dev/shm/sglang_loads_{group}_*.shm", "/dev/shm/sem.sidp-{group}-*")
_KILL_SECONDS = 8.0
_QUIET_SECONDS = 0.2  # a process in the middle of its exec has no environment to be known by
_STALE_SECONDS = 60.0
_LONGEST_PARENT = 55  # characters: the path of a Unix socket has at most 107
_LOCK_FILE = "janitor.lock"


class Janitor:
    """One engine's directory and the process that watches over it; made by the main process."""

    def __init__(self, group: str) -> None:
        parent = tempfile.gettempdir()
        self.group = group
        parent = parent if len(parent) <= _LONGEST_PARENT else "/tmp"
        sweep(parent)
        self.directory = Path(parent, f"sidp-{group}")
        self.directory.mkdir(mode=0o700)
        (self.directory / _LOCK_FILE).touch()
        self._lock: int | None = _lock(str(self.directory))
        self._alive, self._done = self._start()

    def _start(self) -> tuple[int, int]:
        """Returns the pipe whose closing starts the work, and the one that closes at its end."""
        import subprocess

        their_alive, alive = os.pipe()  # neither is inherited by any other child
        done, their_done = os.pipe()
        assert self._lock is not None
        try:
            # -I -S: nothing of the user's environment can slow or break it.
            command = [sys.executable, "-I", "-S", __file__, self.group, str(self.directory)]
            subprocess.run(
                [*command, str(os.getpid())],
                stdin=their_alive,
                stdout=their_done,
                stderr=subprocess.DEVNULL,  # whoever reads the engine's output must see its end
                pass_fds=[self._lock],
                start_new_session=True,  # a terminal's Ctrl-C does not reach it
                check=True,
            )
        finally:
            os.close(their_alive)
            os.close(their_done)
        return alive, done

    def close(self, timeout: float = 5.0) -> None:
        """Clean up now; returns when all is gone, the janitor's process included."""
        if self._lock is None:
            return
        clean(self.group, str(self.directory))
        os.close(self._alive)
        select.select([self._done], [], [], timeout)
        os.close(self._done)
        os.close(self._lock)
        self._lock = None


def find_processes(group: str) -> list[int]:
    """Process ids of all that carry the group's mark, but for this process."""
    mark = f"{MARK}={group}\0".encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                environment = Path("/proc", entry, "environ").read_bytes()
            except OSError:
                continue  # gone, or another user's
            if mark in environment:
                found.append(int(entry))
    return found


def kill_processes(group: str, timeout: float = _KILL_SECONDS) -> None:
    """SIGKILL every process of the group, also those that it starts meanwhile, and wait."""
    deadline = time.monotonic() + timeout
    last_seen = time.monotonic()
    dying: set[int] = set()
    while time.monotonic() < deadline:
        found = find_processes(group)
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        # The environment goes first when a process dies, its devices' memory last.
        dying = {pid for pid in dying.union(found) if _is_running(pid)}
        if found or dying:
            last_seen = time.monotonic()
        elif time.monotonic() - last_seen > _QUIET_SECONDS:
            return
        time.sleep(0.02)


def clean(group: str, directory: str) -> None:
    """Kill the group's processes, then remove its directory and its shared memory."""
    kill_processes(group)
    shutil.rmtree(directory, ignore_errors=True)
    for pattern in _SEGMENTS:
        for path in glob.glob(pattern.format(group=group)):
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue


def sweep(parent: str) -> None:
    """Clean up after engines whose main process and janitor are both gone."""
    for lock_file in glob.glob(f"{glob.escape(parent)}/sidp-*/{_LOCK_FILE}"):
        path = os.path.dirname(lock_file)
        try:
            status = os.stat(lock_file)
            # A young file may be about to be locked by its maker.
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < _STALE_SECONDS:
                continue
            lock = _lock(path)
        except OSError:
            continue  # in use, or gone meanwhile
        try:
            clean(os.path.basename(path).removeprefix("sidp-"), path)
        finally:
            os.close(lock)


def _lock(directory: str) -> int:
    """Held as long as the main process or the janitor lives; raises OSError when held already."""
    descriptor = os.open(f"{directory}/{_LOCK_FILE}", os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_running(pid: int) -> bool:
    try:
        status = Path("/proc", str(pid), "stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def _wait_for_end(main_pid: int) -> None:
    """Until the main process closes standard input or dies.

    Its process id is watched too, because a child that it forks holds the pipe as well.
    """
    poll = select.poll()
    poll.register(0, select.POLLIN)
    try:
        poll.register(os.pidfd_open(main_pid), select.POLLIN)
    except ProcessLookupError:
        return
    except OSError:
        pass  # a kernel without pidfd_open: the pipe must do
    poll.poll()


def _main(group: str, directory: str, main_pid: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    if os.fork():
        os._exit(0)  # an orphan is no child of the main process: SGLang kills all of those
    os.chdir("/")
    _wait_for_end(int(main_pid))
    clean(group, directory)


if __name__ == "__main__":
    _main(*sys.argv[1:])

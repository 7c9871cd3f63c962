"""One engine with --sidp as its main process sees it: starting, running, failed or closed.

Whatever ends one process of the engine ends the engine: the first failure is kept, the other
processes are killed, and everybody who waits for an answer gets the failure.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import TypeVar

import psutil

from sidp_sgl.errors import SidpError
from sidp_sgl.scheduler.lifecycle.liveness import (
    ENGINE,
    Exited,
    Failed,
    LifelineServer,
    Message,
    Pooled,
    RankFailure,
    Unguarded,
    UnguardedScript,
    describe_exit,
    watch_process,
)
from sidp_sgl.scheduler.member import Member

Result = TypeVar("Result")
_LAST_MESSAGE_SECONDS = 1.0  # a process's own reason is preferred to how it ended
_LOST_MEMBER_SECONDS = 1.0  # a process that was lost is preferred to what its TP ranks say of it
_SETTLE_SECONDS = 5.0
_POOLED_SECONDS = 10.0
_KILL_SECONDS = 8.0
_REAP_SECONDS = 5.0
_WAKE_TRIES = 50


class Guard:
    """Made before the engine's first process, closed after its last.

    `announce` gets the first failure at once, `after_failure` is called when all that wait have
    been told and nothing of the engine is left. `is_draining`: whether ranks are meant to exit.
    """

    def __init__(self, engine: str, announce: Callable[[RankFailure], None]) -> None:
        self.engine = engine
        self.failure: RankFailure | None = None
        self.is_closed = False
        self.is_ready = False
        self.after_failure: Callable[[], None] = lambda: None
        self._announce = announce
        self.is_draining: Callable[[], bool] = lambda: False
        self._state = threading.Condition()
        self._release_lock = threading.Lock()
        self._pooled: set[Member] = set()
        self._processes: list[tuple[BaseProcess, psutil.Process]] = []
        self._waiting: set[asyncio.Task] = set()
        self._lifeline = LifelineServer(engine, self._on_message)

    def watch(self, process: BaseProcess, name: str) -> None:
        """`process` is a child of this process; when it ends, the engine has failed."""
        self._processes.append((process, psutil.Process(process.pid)))
        watch_process(process, lambda pid, code: self._on_child_exit(name, pid, code))

    def watches(self, process: BaseProcess) -> bool:
        return any(process is watched for watched, _ in self._processes)

    def _on_message(self, message: Message) -> None:
        match message:
            case Pooled(member):
                with self._state:
                    self._pooled.add(member)
                    self._state.notify_all()
            case Failed(member, reason):
                if member is not None and member.tp_size > 1:
                    self._wait_for_failure(_LOST_MEMBER_SECONDS)
                self.fail(f"{member or 'a rank'} failed", f": {reason}")
            case Unguarded():
                self._fail_with(UnguardedScript())
            case Exited(member, pid, exitcode):
                patience = _LAST_MESSAGE_SECONDS + _LOST_MEMBER_SECONDS
                self._lifeline.wait_for_last_message(pid, patience)
                self._on_exit(str(member), pid, exitcode)

    def _on_child_exit(self, name: str, pid: int, exitcode: int) -> None:
        # A rank's failure takes the processes around it along: let its report come first.
        self._wait_for_failure(_LAST_MESSAGE_SECONDS)
        self._on_exit(name, pid, exitcode)

    def _on_exit(self, name: str, pid: int, exitcode: int) -> None:
        if exitcode == 0 and self.is_draining():
            return
        hint = " (if memory ran out, dmesg names the process)"
        self.fail(
            f"{name} (pid {pid}) {describe_exit(exitcode)}",
            "; the engine has been shut down: start it again"
            + (hint if exitcode == -signal.SIGKILL else ""),
        )

    def _wait_for_failure(self, timeout: float) -> None:
        with self._state:
            self._state.wait_for(lambda: self.failure is not None or self.is_closed, timeout)

    def fail(self, event: str, details: str) -> None:
        """End the engine, from any thread; only the first event counts."""
        phase = "running" if self.is_ready else "starting"
        self._fail_with(RankFailure(f"{event} while the engine was {phase}{details}"))

    def _fail_with(self, failure: RankFailure) -> None:
        with self._state:
            if self.failure is not None or self.is_closed:
                return
            self.failure = failure
            self._announce(self.failure)
            self._state.notify_all()
        threading.Thread(target=self._end, daemon=True).start()

    def fail_soon(self, event: str, details: str) -> None:
        """As `fail`, unless a better reason comes meanwhile; may be called by a signal handler."""
        timer = threading.Timer(_LAST_MESSAGE_SECONDS, self.fail, [event, details])
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        self._release()
        self._wake()
        threading.Thread(target=self.after_failure, daemon=True).start()
        for _ in range(_WAKE_TRIES):  # asyncio.wait_for of Python 3.11 may swallow a cancellation
            if self._waiting:
                time.sleep(0.2)
                self._wake()

    def _wake(self) -> None:
        for task in list(self._waiting):
            with suppress(RuntimeError):  # its loop is closed
                task.get_loop().call_soon_threadsafe(self._cancel, task)

    def _cancel(self, task: asyncio.Task) -> None:
        if task in self._waiting:
            task.cancel()

    async def unless_failed(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """The result of `call`; raises RankFailure as soon as the engine has failed."""
        task = asyncio.current_task()
        assert task is not None
        is_outermost = task not in self._waiting
        self._waiting.add(task)  # before the check: `fail` does it the other way round
        try:
            self.raise_if_ended()
            return await call()
        except asyncio.CancelledError:
            if self.failure is None:
                raise
            while task.uncancel():
                pass
            raise self._new_failure() from None
        finally:
            if is_outermost:
                self._waiting.discard(task)

    def raise_if_ended(self) -> None:
        if self.failure is not None:
            raise self._new_failure()
        if self.is_closed:
            raise SidpError("the engine has been shut down: start another one")

    def _new_failure(self) -> RankFailure:
        """A fresh exception per raise: an exception object collects tracebacks."""
        is_script = isinstance(self.failure, UnguardedScript)
        return UnguardedScript() if is_script else RankFailure(str(self.failure))

    def explanation(self) -> RankFailure | None:
        """The failure behind an error of the start; None where the engine's processes all live."""
        if any(process.exitcode is not None for process, _ in self._processes):
            self._wait_for_failure(_SETTLE_SECONDS)
        return None if self.failure is None else self._new_failure()

    def ready(self, members: Iterable[Member]) -> None:
        """All have started; fails the engine where one did so without a pool."""
        expected = set(members)
        with self._state:
            self._state.wait_for(
                lambda: expected <= self._pooled or self.failure is not None, _POOLED_SECONDS
            )
        if missing := expected - self._pooled:
            self.fail(
                f"{min(missing)} started without SiDP's hooks",
                ": see its log above, and that SGLANG_PLUGINS, if set, contains sidp",
            )
        self.raise_if_ended()
        self.is_ready = True

    def close(self) -> None:
        """End the engine; returns when its processes have ended."""
        with self._state:
            self.is_closed = True
            self._state.notify_all()
        self._release()

    def _release(self) -> None:
        with self._release_lock:
            _kill([known for _, known in self._processes])
            self._lifeline.close()
            for process, _ in self._processes:
                _reap(process)


@contextmanager
def spawning(engine: str) -> Iterator[None]:
    """Processes started inside, and theirs, know their engine from the start, and leave a
    terminal's Ctrl-C to this process."""
    resource_tracker.ensure_running()  # its start, which comes with the first process, unblocks it
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ[ENGINE] = engine
    try:
        yield
    finally:
        del os.environ[ENGINE]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _kill(processes: list[psutil.Process]) -> None:
    """SIGKILL them and all theirs; returns when they have ended.

    One that starts meanwhile, or whose parent has ended before, ends by its lifeline.
    """
    doomed = list(processes)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            doomed += process.children(recursive=True)
    for process in doomed:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + _KILL_SECONDS
    while any(map(_is_running, doomed)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _reap(process: BaseProcess) -> None:
    """Leave no zombie of a process that was killed."""
    # Another thread may have reaped it and not have stored its exit code yet: `join` alone would
    # return without one, and the process would count as active.
    deadline = time.monotonic() + _REAP_SECONDS
    while process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.join(0)

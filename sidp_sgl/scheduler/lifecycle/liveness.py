"""The lifeline between an engine's main process and its other processes.

Each of them holds a connection to the main process: it reports over it, and ends at once when the
main process does. The sockets are abstract: nothing of them stays in a file system.
"""

import functools
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import NoReturn

from msgspec import Struct, json

from sidp_sgl.errors import SidpError
from sidp_sgl.scheduler.lifecycle.credentials import peer
from sidp_sgl.scheduler.member import Member

ENGINE = "SIDP_ENGINE"  # environment variable: the engine that a process was started for


class RankFailure(SidpError):
    """The engine has ended because a rank of it did; the message names the rank."""


class UnguardedScript(RankFailure):
    """The user's script starts the engine again in a process of the engine."""

    def __init__(self) -> None:
        super().__init__(
            'the script starts the engine outside of `if __name__ == "__main__":`, and every '
            "process of an engine runs it again up to there: move the start below that line"
        )


class _Message(Struct, frozen=True, forbid_unknown_fields=True, tag=True, tag_field="kind"):
    pass


class Pooled(_Message, frozen=True):
    """The member's pool is active."""

    member: Member


class Failed(_Message, frozen=True):
    """The process gives up; `member` is None where it does not know yet which one it is."""

    member: Member | None
    reason: str  # one line


class Unguarded(_Message, frozen=True):
    """The process has come to the start of an engine, in the script of its main process."""


class Exited(_Message, frozen=True):
    """The DP controller saw the process of a member end."""

    member: Member
    pid: int
    exitcode: int  # as in multiprocessing: minus the signal's number


Message = Pooled | Failed | Unguarded | Exited
_decoder = json.Decoder(Message)


def encode(message: Message) -> bytes:
    return json.encode(message) + b"\n"


def decode(line: bytes) -> Message | None:
    """None where the line is malformed or of an unknown kind."""
    try:
        return _decoder.decode(line)
    except ValueError:  # msgspec's own errors, and text that is no UTF-8
        return None


class LifelineServer:
    """The main process's end. `on_message` is called in the sender's own thread."""

    def __init__(self, engine: str, on_message: Callable[[Message], None]) -> None:
        self._on_message = on_message
        self._connections: list[socket.socket] = []
        self._readers: dict[int, threading.Thread] = {}  # by process id of the sender
        self._readers_lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(_address(engine))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        try:
            while True:
                select.select([self._listener], [], [])
                with self._readers_lock:  # no connection is neither waiting nor has a reader
                    self._accept_one()
        except (OSError, ValueError):
            return  # closed

    def _accept_one(self) -> None:
        connection, _ = self._listener.accept()
        pid, user = peer(connection)
        if user != os.getuid():
            connection.close()
            return
        self._connections.append(connection)
        reader = threading.Thread(target=self._read, args=(connection,), daemon=True)
        self._readers[pid] = reader
        reader.start()

    def _read(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            try:
                for line in lines:
                    if (message := decode(line)) is not None:
                        self._on_message(message)
            except OSError:
                return  # the process was killed, or the server was closed

    def wait_for_last_message(self, pid: int, timeout: float) -> None:
        """Until everything that process `pid` has reported before it ended has been handled."""
        deadline = time.monotonic() + timeout
        while True:
            is_waiting = self._has_waiting_connections()  # before: accepted means registered
            reader = self._reader_of(pid)
            if reader is not None or not is_waiting or time.monotonic() > deadline:
                break
            time.sleep(0.005)
        if reader is not None and reader is not threading.current_thread():
            reader.join(max(0.0, deadline - time.monotonic()))

    def _reader_of(self, pid: int) -> threading.Thread | None:
        with self._readers_lock:
            return self._readers.get(pid)

    def _has_waiting_connections(self) -> bool:
        try:
            return bool(select.select([self._listener], [], [], 0)[0])
        except (OSError, ValueError):
            return False  # closed

    def close(self, timeout: float = 5.0) -> None:
        """End the other processes; returns when they have ended."""
        with self._readers_lock:  # nobody is accepted any more
            with suppress(OSError):  # once more
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits on it
            self._listener.close()
        for connection in self._connections:
            with suppress(OSError):  # its peer has gone first
                connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + timeout
        for reader in self._readers.values():
            reader.join(max(0.0, deadline - time.monotonic()))  # until the other end is closed


class Lifeline:
    """The end of any other process, which ends when the main process closes its own or dies.

    One per process: see `tie`.
    """

    def __init__(self, engine: str) -> None:
        """Raises OSError where the main process is gone."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(_address(engine))
        threading.Thread(target=self._end_with_main, daemon=True).start()

    def _end_with_main(self) -> None:
        try:
            self._socket.recv(1)
        finally:
            os._exit(1)

    def send(self, message: Message) -> None:
        self._socket.sendall(encode(message))


@functools.cache
def tie(engine: str) -> Lifeline:
    """This process's lifeline; ends the process where the main process has gone already."""
    try:
        return Lifeline(engine)
    except OSError:
        os._exit(1)


def give_up(engine: str, member: Member | None, error: BaseException) -> None:
    """Tell the main process why, and end this process without a word more."""
    end_with(engine, Failed(member, one_line(error)))


def end_with(engine: str, message: Message) -> NoReturn:
    try:
        tie(engine).send(message)
    finally:
        os._exit(1)


def one_line(error: BaseException) -> str:
    """An error as the one line that a user reads."""
    text = " ".join(str(error).split())
    if isinstance(error, SidpError):
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")[:500]


def watch_process(process: BaseProcess, on_exit: Callable[[int, int], None]) -> None:
    """Call `on_exit(pid, exitcode)` in a thread of its own when a child process has ended."""

    def watch() -> None:
        # The sentinel is a pipe that grandchildren may hold, so the exit code is asked as well.
        while process.exitcode is None:
            wait([process.sentinel], timeout=1.0)
        assert process.pid is not None
        on_exit(process.pid, process.exitcode)

    threading.Thread(target=watch, daemon=True).start()


def describe_exit(exitcode: int) -> str:
    """How a process ended: `was killed by SIGKILL`, `exited with code 1`."""
    if exitcode >= 0:
        return f"exited with code {exitcode}"
    try:
        return f"was killed by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"was killed by signal {-exitcode}"


def _address(engine: str) -> str:
    return f"\0sidp-{engine}-main"

"""The engine as the job sees it: a process of its own, which may die without the job.

Not in the job's process, because plain SGLang kills its main process when a rank
raises, because a crash in native code takes a process along, and because a process that has had an
engine keeps its memory, its CUDA context and its signal handlers. The job's process, which owns
the output, never imports torch. Two ends of one ZMQ pair; the child sees by its standard input
that the job has gone.
"""

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import zmq

from sidp_sgl.batch.errors import EngineEnded
from sidp_sgl.batch.files.records import Answer
from sidp_sgl.batch.files.request import Request
from sidp_sgl.batch.progress import NO_STATUS, EngineStatus
from sidp_sgl.errors import SidpUsageError
from sidp_sgl.scheduler.lifecycle.liveness import describe_exit

PROGRAM = "sidp_sgl.batch.engine"
# Kinds of messages. To the engine:
START, REQUEST, STOP = b"start", b"request", b"stop"
# From the engine; FAILED carries a text, and `usage` where the user has to change something:
PARSED, READY, ANSWER, STATUS, FAILED = b"parsed", b"ready", b"answer", b"status", b"failed"
_PARSE_SECONDS = 600.0  # imports of SGLang, from a slow disk
_CONNECT_SECONDS = 60.0  # of Python's own start
_STOP_SECONDS = 30.0
_LAST_MESSAGE_SECONDS = 1.0
_POLL_SECONDS = 0.2
_MOST_AT_ONCE = 1000  # answers, so that they are written in between


class EngineProcess:
    """`arguments`: SGLang's and SiDP's command line. Starts to import and parse at once; the
    engine itself starts with `start`."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.is_ready = False
        self.status = NO_STATUS
        self._failure: str | None = None
        self._settings: dict[str, str] | None = None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # the job bounds what is under way
        self._socket.set(zmq.IPC_FILTER_UID, os.getuid())
        address = f"ipc://@sidp-batch-{uuid.uuid4().hex}"  # abstract: leaves no file
        self._socket.bind(address)
        self._process = subprocess.Popen(
            [sys.executable, "-m", PROGRAM, address, *arguments],
            stdin=subprocess.PIPE,
            stdout=sys.stderr.fileno(),
            env={"PYTHONWARNINGS": "ignore", **os.environ},
            start_new_session=True,  # what Ctrl-C means is for the job to decide
        )

    def look(self, timeout: float) -> dict[str, str] | None:
        """The settings once the flags have been read; raises SidpUsageError or EngineEnded."""
        if self._settings is None and (message := self._next_message(timeout)) is not None:
            assert message[0] == PARSED
            self._settings = orjson.loads(message[1])
        return self._settings

    def settings(self, check_signals: Callable[[], None]) -> dict[str, str]:
        """What the command line says about results; raises SidpUsageError or EngineEnded."""
        deadline = time.monotonic() + _PARSE_SECONDS
        while time.monotonic() < deadline:
            check_signals()
            if (settings := self.look(_POLL_SECONDS)) is not None:
                return settings
        raise EngineEnded(f"SGLang could not be imported in {_PARSE_SECONDS:.0f} s")

    def start(self) -> None:
        self._send(START)

    def send(self, request: Request) -> None:
        """Raises EngineEnded."""
        self._send(REQUEST, orjson.dumps([request.line, request.url]), request.body)

    def _send(self, *message: bytes) -> None:
        deadline = time.monotonic() + _CONNECT_SECONDS
        while not self._socket.poll(int(_POLL_SECONDS * 1000), zmq.POLLOUT):
            # Nobody is there: not yet, or not any more.
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise EngineEnded(self._wait_for_end())
        self._socket.send_multipart(message, zmq.DONTWAIT)

    def _wait_for_end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_MESSAGE_SECONDS)
        code = self._process.returncode
        self._failure = "the engine's process " + (
            "does not listen" if code is None else describe_exit(code)
        )
        return self._failure

    def receive(self, timeout: float) -> list[Answer]:
        answers: list[Answer] = []
        while len(answers) < _MOST_AT_ONCE:
            try:
                message = self._next_message(0.0 if answers else timeout)
            except EngineEnded:
                if not answers:
                    raise
                break  # what it has said before counts; the next call raises
            if message is None:
                break
            kind, content, *body = message
            if kind == ANSWER:
                line, status, prompt_tokens, completion_tokens = orjson.loads(content)
                answers.append(Answer(line, status, body[0], prompt_tokens, completion_tokens))
            elif kind == STATUS:
                self.status = EngineStatus(*orjson.loads(content))
                timeout = 0.0
            elif kind == READY:
                self.is_ready = True
                timeout = 0.0
        return answers

    def _next_message(self, timeout: float) -> list[bytes] | None:
        """None where there is none in time; raises EngineEnded or SidpUsageError."""
        if self._failure is not None:
            raise EngineEnded(self._failure)
        if not self._socket.poll(int(timeout * 1000)):
            if self._process.poll() is None:
                return None
            if not self._socket.poll(int(_LAST_MESSAGE_SECONDS * 1000)):
                raise EngineEnded(self._wait_for_end())
        message = self._socket.recv_multipart()
        if message[0] == FAILED:
            content: dict[str, Any] = orjson.loads(message[1])
            if content["usage"]:
                raise SidpUsageError(content["reason"])
            self._failure = content["reason"]
            raise EngineEnded(self._failure)
        return message

    def close(self) -> None:
        """End it, orderly where it listens."""
        if self._socket.closed:
            return
        assert self._process.stdin is not None
        if self.is_ready and self._failure is None:
            with contextlib.suppress(EngineEnded):
                self._send(STOP)
                self._wait()
        self._process.stdin.close()  # what the loss of the job would do
        if not self._wait():
            self._process.kill()
            self._process.wait()
        self._socket.close(linger=0)
        self._context.term()

    def _wait(self) -> bool:
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True

"""The lifeline: what other processes report, and that they end with the main process."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import get_context

import pytest

from sidp_sgl.errors import SidpError
from sidp_sgl.scheduler.lifecycle.liveness import (
    Exited,
    Failed,
    Lifeline,
    LifelineServer,
    Message,
    Pooled,
    Unguarded,
    decode,
    describe_exit,
    encode,
    one_line,
    watch_process,
)
from sidp_sgl.scheduler.member import Member

# Another process of the engine; `{}` is what it does once it is connected.
PROCESS = """
import os, sys, time
from sidp_sgl.errors import SidpError
from sidp_sgl.scheduler.lifecycle.liveness import Exited, Lifeline, Pooled, give_up
from sidp_sgl.scheduler.member import Member
lifeline = Lifeline(sys.argv[1])
print("connected", flush=True)
{}
time.sleep(60)
"""
MAIN = """
import sys, time
from sidp_sgl.scheduler.lifecycle.liveness import LifelineServer
server = LifelineServer(sys.argv[1], print)
print("listening", flush=True)
time.sleep(60)
"""


@pytest.fixture
def engine() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def received(engine: str) -> Iterator[tuple[LifelineServer, list[Message]]]:
    messages: list[Message] = []
    server = LifelineServer(engine, messages.append)
    yield server, messages
    server.close()


def python(code: str, engine: str) -> subprocess.Popen:
    """Started, and past its first line of output."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, engine],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline()
    return process


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "message",
    [
        Pooled(Member(3)),
        Failed(Member(0, 1, 2), "no memory"),
        Failed(None, "x"),
        Exited(Member(1), 4711, -9),
        Unguarded(),
    ],
)
def test_messages_survive_the_wire(message: Message) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert decode(line) == message


@pytest.mark.parametrize(
    "line",
    [b"", b"nonsense", b"[]", b"{}", b'{"kind": "Pooled"}', b'{"kind": "New", "member": [1, 0, 1]}',
     b'{"kind": "Pooled", "member": [1, 0, 1], "more": 2}', b'{"kind": "Pooled", "member": 1}',
     b'{"kind": "Pooled", "member": [-1, 0, 1]}', b'{"kind": "Pooled", "member": [1, 0, true]}',
     b'{"kind": "Failed", "member": null, "reason": "\xff"}'],
)  # fmt: skip
def test_malformed_lines_are_dropped(line: bytes) -> None:
    assert decode(line) is None


def test_everything_a_process_said_before_it_was_killed_arrives(
    engine: str, received: tuple[LifelineServer, list[Message]]
) -> None:
    server, messages = received
    sends = "for rank in range(100): lifeline.send(Pooled(Member(rank)))\nos.kill(os.getpid(), 9)"
    process = python(PROCESS.format(sends), engine)
    process.wait(10)
    server.wait_for_last_message(process.pid, 10.0)
    assert messages == [Pooled(Member(rank)) for rank in range(100)]


def test_giving_up_is_quiet_and_names_the_reason(
    engine: str, received: tuple[LifelineServer, list[Message]]
) -> None:
    _, messages = received
    process = python(
        PROCESS.format("give_up(sys.argv[1], Member(1), SidpError('no\\nFFN'))"), engine
    )
    output, _ = process.communicate(timeout=10)
    assert (process.returncode, output) == (1, "")
    wait_until(lambda: bool(messages))
    assert messages == [Failed(Member(1), "no FFN")]


def test_processes_end_when_the_main_process_closes(engine: str) -> None:
    server = LifelineServer(engine, print)
    processes = [python(PROCESS.format(""), engine) for _ in range(2)]
    assert all(process.poll() is None for process in processes)
    server.close()
    assert [process.wait(5) for process in processes] == [1, 1]


def test_processes_end_when_the_main_process_is_killed(engine: str) -> None:
    main = python(MAIN, engine)
    process = python(PROCESS.format(""), engine)
    main.kill()
    assert process.wait(5) == 1
    main.wait()


def test_without_a_main_process_there_is_no_lifeline(engine: str) -> None:
    with pytest.raises(OSError):
        Lifeline(engine)


def test_a_closed_server_ends_its_threads_and_frees_its_address(engine: str) -> None:
    before = threading.active_count()
    for _ in range(3):
        server = LifelineServer(engine, print)
        process = python(PROCESS.format(""), engine)
        server.close()
        process.wait(5)
    wait_until(lambda: threading.active_count() == before)


@pytest.mark.parametrize(("code", "exitcode"), [("", -signal.SIGKILL), ("0", 0), ("3", 3)])
def test_watching_a_process(code: str, exitcode: int) -> None:
    context = get_context("spawn")
    process = context.Process(target=sys.exit if code else time.sleep, args=(int(code or 60),))
    exits: list[tuple[int, int]] = []
    process.start()
    assert process.pid is not None
    watch_process(process, lambda pid, code: exits.append((pid, code)))
    if not code:
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: bool(exits), 30.0)
    assert exits == [(process.pid, exitcode)]


def test_exits_in_words() -> None:
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(-200) == "was killed by signal 200"
    assert describe_exit(1) == "exited with code 1"


def test_errors_in_one_line() -> None:
    assert one_line(SidpError("no\n  FFN")) == "no FFN"
    assert one_line(ValueError("a\nb")) == "ValueError: a b"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 10_000))) == 500

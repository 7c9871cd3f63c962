"""The engine's process as the job sees it: its messages, and every way in which it can end."""

import os
import time
from collections.abc import Callable, Iterator

import pytest

from sidp_sgl.batch import engine_process
from sidp_sgl.batch.engine_process import EngineProcess
from sidp_sgl.batch.errors import EngineEnded, Interrupted
from sidp_sgl.batch.files.records import Answer
from sidp_sgl.batch.files.request import COMPLETIONS, Request
from sidp_sgl.batch.progress import EngineStatus
from sidp_sgl.errors import SidpUsageError

Start = Callable[[str], EngineProcess]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Start]:
    monkeypatch.setattr(engine_process, "PROGRAM", "tests.support.stub_engine")
    monkeypatch.setattr(engine_process, "_STOP_SECONDS", 5.0)
    made = []
    with open(tmp_path / "stderr", "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)

        def make(behaviour: str) -> EngineProcess:
            made.append(EngineProcess([behaviour]))
            return made[-1]

        yield make
        for process in made:
            process.close()
            assert process._process.returncode is not None


def request(line: int, num_bytes: int = 10) -> Request:
    return Request(line, f"r{line}", COMPLETIONS, b"x" * num_bytes, num_bytes)


def receive(engine: EngineProcess, number: int) -> list[Answer]:
    answers: list[Answer] = []
    deadline = time.monotonic() + 30.0
    while len(answers) < number and time.monotonic() < deadline:
        answers += engine.receive(0.2)
    return answers


def no_signal() -> None: ...


def test_requests_and_answers(start: Start) -> None:
    engine = start("good")
    assert engine.settings(no_signal) == engine.look(0.0) == {"--dtype": "auto"}
    engine.start()
    for line in range(1, 6):
        engine.send(request(line, num_bytes=100_000))
    answers = receive(engine, 5)
    assert [(a.line, a.status, a.prompt_tokens, a.completion_tokens) for a in answers] == [
        (line, 200, 5, 7) for line in range(1, 6)
    ]
    assert all(answer.body == b"x" * 100_000 for answer in answers)
    assert engine.is_ready and engine.status == EngineStatus({"was": 3, "cas": 1}, 0.5)
    engine.close()
    engine.close()
    assert engine._process.returncode == 0


def test_requests_sent_before_the_process_is_there(start: Start) -> None:
    """An engine that is started again gets what the dead one has left at once."""
    engine = start("good")
    engine.start()
    engine.send(request(1))
    assert [answer.line for answer in receive(engine, 1)] == [1]


def test_a_wrong_flag(start: Start) -> None:
    with pytest.raises(SidpUsageError, match="unrecognized arguments: --foo"):
        start("usage").settings(no_signal)


def test_a_process_that_can_not_import(start: Start) -> None:
    with pytest.raises(EngineEnded, match="the engine's process exited with code 3"):
        start("no import").settings(no_signal)


def test_an_engine_that_does_not_start(start: Start) -> None:
    engine = start("no start")
    engine.settings(no_signal)
    engine.start()
    with pytest.raises(EngineEnded, match="DP rank 0 failed"):
        receive(engine, 1)
    assert not engine.is_ready


def test_a_killed_process(start: Start) -> None:
    """What it has answered counts; then both directions say that it is gone."""
    engine = start("killed")
    engine.settings(no_signal)
    engine.start()
    for line in (1, 2, 3):
        engine.send(request(line))
    assert len(receive(engine, 3)) == 3
    with pytest.raises(EngineEnded, match="the engine's process was killed by SIGKILL"):
        receive(engine, 1)
    with pytest.raises(EngineEnded):
        engine.send(request(4))


def test_sending_to_a_process_that_has_gone(start: Start) -> None:
    engine = start("killed")
    engine.settings(no_signal)
    engine.start()
    with pytest.raises(EngineEnded, match="was killed by SIGKILL"):
        for line in range(1, 200):
            engine.send(request(line))
            time.sleep(0.02)


def test_stopped_while_it_imports(start: Start) -> None:
    def interrupt() -> None:
        raise Interrupted(2)

    engine = start("good")
    with pytest.raises(Interrupted):
        engine.settings(interrupt)
    started = time.monotonic()
    engine.close()
    assert engine._process.returncode is not None
    assert time.monotonic() - started < 5.0


def test_a_process_that_does_not_stop(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "_STOP_SECONDS", 0.5)
    engine = start("deaf")
    engine.settings(no_signal)
    engine.start()
    engine.send(request(1))
    receive(engine, 1)
    engine.close()
    assert engine._process.returncode == 1
    assert not os.path.exists(f"/proc/{engine._process.pid}")

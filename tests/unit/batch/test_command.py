"""`sidp-sgl run-batch` as a user meets it, with an engine that answers at once."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sidp_sgl import cli
from sidp_sgl.batch import command
from sidp_sgl.batch.errors import EngineEnded
from sidp_sgl.errors import SidpUsageError
from tests.support.jobs import FakeEngine, line, records, write_lines


class Process(FakeEngine):
    """Stands for EngineProcess."""

    made: ClassVar[list["Process"]] = []
    flags_error: Exception | None = None
    options: ClassVar[dict[str, Any]] = {}
    on_send: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(**self.options)
        self.arguments = arguments
        self.started = False
        self.made.append(self)

    def look(self, timeout: float) -> dict[str, str]:
        if self.flags_error is not None:
            raise self.flags_error
        return {"--dtype": dict(zip(self.arguments, self.arguments[1:], strict=False))["--dtype"]}

    def settings(self, check_signals: Callable[[], None]) -> dict[str, str]:
        check_signals()
        return self.look(0.0)

    def start(self) -> None:
        self.started = True

    def send(self, request: Any) -> None:
        self.on_send()
        super().send(request)


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Process]]:
    monkeypatch.setattr(command, "EngineProcess", Process)
    monkeypatch.setattr(Process, "made", [])
    yield Process.made
    assert all(engine.is_closed for engine in Process.made)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_lines(tmp_path / "in", [line("a"), line("b", "bad"), line("c")])
    return tmp_path


def run(folder: Path, *flags: str, dtype: str = "auto") -> int:
    files = ["-i", str(folder / "in"), "-o", str(folder / "out")]
    return cli.main(["run-batch", *files, "--model", "m", "--dtype", dtype, "--sidp", *flags])


def statuses(folder: Path) -> dict[str, int]:
    found = records(folder / "out")
    by_id = {record["custom_id"]: record["response"]["status_code"] for record in found}
    assert len(by_id) == len(found)
    return by_id


def test_a_job(job: Path, engines: list[Process], capsys: pytest.CaptureFixture) -> None:
    assert run(job, "--dp-size", "2") == 0
    assert statuses(job) == {"a": 200, "b": 400, "c": 200}
    assert engines[0].arguments == ["--model", "m", "--dtype", "auto", "--sidp", "--dp-size", "2"]
    assert sorted(os.listdir(job)) == ["in", "out", "out.state"]
    output = capsys.readouterr()
    assert not output.out
    assert "3 of 3 requests done, 1 of them error records" in output.err


def test_a_finished_job_starts_no_engine(job: Path, engines: list[Process]) -> None:
    assert run(job) == run(job) == 0
    assert [engine.started for engine in engines] == [True, False]


def test_errors_are_retried_on_demand(job: Path, engines: list[Process]) -> None:
    assert run(job) == 0
    assert run(job, "--retry-errors") == 0
    assert [request.custom_id for request in engines[1].sent] == ["b"]
    assert statuses(job) == {"a": 200, "b": 400, "c": 200}
    assert sorted(os.listdir(job)) == ["in", "out", "out.state"]


def test_a_torn_record_is_run_again(job: Path, engines: list[Process], capsys) -> None:
    assert run(job) == 0
    content = (job / "out").read_bytes()
    (job / "out").write_bytes(content[:-5])
    assert run(job) == 0
    assert len(engines[1].sent) == 1
    assert sorted((job / "out").read_bytes().splitlines()) == sorted(content.splitlines())
    assert "of an unfinished record off" in capsys.readouterr().err


def test_other_settings_are_refused(job: Path, engines: list[Process], capsys) -> None:
    assert run(job) == 0
    content = (job / "out").read_bytes()
    assert run(job, dtype="float16") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--dtype was auto, is float16; use those again, or another --output-file" in error
    write_lines(job / "in", [line("a"), line("x"), line("c")])
    assert run(job) == 2
    assert "the input had 3 requests" in capsys.readouterr().err
    assert (job / "out").read_bytes() == content
    assert not engines[1].started and not engines[2].started


def test_how_the_engine_is_spread_may_change(job: Path) -> None:
    assert run(job, "--dp-size", "2") == 0
    assert (
        run(job, "--dp-size", "4", "--tp-size", "2", "--retry-errors", "--max-restarts", "9") == 0
    )


def test_a_file_of_something_else_is_not_touched(job: Path, capsys) -> None:
    (job / "out").write_text("my thesis\n")
    assert run(job) == 2
    assert "exists" in capsys.readouterr().err
    assert (job / "out").read_text() == "my thesis\n"


def test_a_removed_output_begins_anew(job: Path) -> None:
    assert run(job) == 0
    (job / "out").unlink()
    assert run(job, dtype="float16") == 0
    assert len(statuses(job)) == 3


def test_wrong_lines(job: Path, engines: list[Process], capsys) -> None:
    write_lines(job / "in", [line("a"), line("a")])
    assert run(job) == 2
    assert "line 2: custom_id is the one of line 1" in capsys.readouterr().err
    assert not engines[0].started
    assert os.listdir(job) == ["in"]


def test_wrong_flags(job: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    error = SidpUsageError("unrecognized arguments: --foo")
    monkeypatch.setattr(Process, "flags_error", error)
    assert run(job, "--foo") == 2
    assert "run-batch: error: unrecognized arguments: --foo" in capsys.readouterr().err
    assert os.listdir(job) == ["in"]
    assert run(job, "--max-restarts", "-1") == 2
    assert "--max-restarts -1 is out of range" in capsys.readouterr().err
    assert run(job, "--max-in-flight", "0") == 2


def test_an_engine_that_dies_again_and_again(
    job: Path, engines: list[Process], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(Process, "options", {"lives_for": 0})
    assert run(job, "--max-restarts", "2") == 1
    assert len(engines) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert "DP rank 1 was killed; that was after 2 restarts" in error
    assert "run the same command again" in error


def test_imports_that_fail(job: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    ended = EngineEnded("the engine's process exited with code 1")
    monkeypatch.setattr(Process, "flags_error", ended)
    assert run(job) == 1
    assert "error: the engine's process exited with code 1" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(job: Path, monkeypatch: pytest.MonkeyPatch, capsys, number: int) -> None:
    before = signal.getsignal(number)
    send = staticmethod(lambda: os.kill(os.getpid(), number))
    with monkeypatch.context() as patch:
        patch.setattr(Process, "on_send", send)
        assert run(job, "--max-in-flight", "1") == 128 + number
    assert "stopped; run the same command again" in capsys.readouterr().err
    assert len(records(job / "out")) == 1
    assert signal.getsignal(number) == before
    assert run(job) == 0
    assert len(statuses(job)) == 3

"""`sidp-sgl run-batch` as a user meets it, with an engine that answers at once."""

import gzip
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import orjson
import pytest

from sidp_sgl import cli
from sidp_sgl.batch import command
from sidp_sgl.batch.errors import EngineEnded
from sidp_sgl.batch.files.records import Answer
from sidp_sgl.batch.files.settings import DETERMINISTIC
from sidp_sgl.batch.files.state import StateFile
from sidp_sgl.batch.suspects import Suspects
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


def test_requests_that_end_the_engine(job: Path, engines: list[Process], capsys) -> None:
    """They do not count against --max-restarts; --retry-errors runs them again."""
    lines = [line("a"), line("p", "poison"), line("c"), line("q", "poison"), line("e")]
    write_lines(job / "in", lines)
    assert run(job, "--max-restarts", "1") == 0
    assert statuses(job) == {"a": 200, "p": 500, "c": 200, "q": 500, "e": 200}
    error = capsys.readouterr().err
    assert "5 requests were in the engine when it ended: they run one by one" in error
    assert "line 2 (p) has ended the engine, alone in it" in error
    assert "2 of them error records" in error and "3 restarts of the engine" in error
    assert run(job, "--retry-errors", "--max-restarts", "1") == 0
    assert statuses(job) == {"a": 200, "p": 500, "c": 200, "q": 500, "e": 200}


def test_a_stopped_job_remembers_its_suspects(
    job: Path, engines: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(job / "in", [line("a"), line("p", "poison"), line("c")])
    assert run(job, "--max-restarts", "0") == 1
    assert orjson.loads((job / "out.state").read_bytes())["suspects"] == [[1, 3, 1]]
    assert run(job, "--max-restarts", "0") == 0
    assert statuses(job) == {"a": 200, "p": 500, "c": 200}
    assert len(engines) == 3  # the first, one that p ends, and one for c
    assert [request.line for request in engines[1].sent] == [0, 1, 2]


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_a_job_that_is_killed_with_its_engine(
    job: Path, engines: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a container is whose memory ran out: its second end makes what was in it suspect."""
    write_lines(job / "in", [line("a"), line("p", "poison"), line("c")])
    note = StateFile.note

    def note_until_killed(state: StateFile, suspects: Suspects, is_running: bool) -> None:
        if is_running:  # after SIGKILL nothing is noted
            note(state, suspects, is_running)

    def receive(engine: Process, timeout: float) -> list[Answer]:
        try:
            return FakeEngine.receive(engine, timeout)
        except EngineEnded:
            raise Killed from None

    monkeypatch.setattr(StateFile, "note", note_until_killed)
    monkeypatch.setattr(Process, "options", {"per_call": 1, "seed": 1})
    monkeypatch.setattr(Process, "receive", receive)
    num_kills = 0
    while num_kills < 10:
        try:
            assert run(job) == 0
            break
        except Killed:
            num_kills += 1
    assert 2 <= num_kills <= 3  # twice among others, once alone
    assert statuses(job) == {"a": 200, "p": 500, "c": 200}
    message = next(r for r in records(job / "out") if r["custom_id"] == "p")["response"]["body"]
    assert "runs of this job were killed" in message["error"]["message"]


def test_a_killed_run_alone_makes_nothing_suspect(job: Path, engines: list[Process]) -> None:
    state = {"suspects": [], "num_lost": 1}
    assert run(job) == 0
    content = orjson.loads((job / "out.state").read_bytes())
    assert {name: content[name] for name in state} == {"suspects": [], "num_lost": 0}
    (job / "out").unlink()
    (job / "out.state").write_bytes(orjson.dumps({**content, **state}))
    assert run(job) == 0
    assert [request.line for request in engines[1].sent] == [1, 2, 3]


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
@pytest.mark.parametrize("name", ["out", "out.rewritten", "out.state", "out.state.new"])
def test_the_input_is_not_written_over(
    job: Path, engines: list[Process], capsys, link: Callable | None, name: str
) -> None:
    content = (job / "in").read_bytes()
    if link is None:
        os.rename(job / "in", job / name)
    else:
        link(job / "in", job / name)
    source = job / name if link is None else job / "in"
    assert cli.main(["run-batch", "-i", str(source), "-o", str(job / "out"), "--dtype", "a"]) == 2
    error = capsys.readouterr().err
    assert f"--output-file {job / 'out'} and --input-file {source} are one file" in error
    assert error.count("\n") == 1 and not engines
    assert source.read_bytes() == content


@pytest.mark.parametrize("files", [["-i", "-", "-o", "in"], ["-i", "in", "-o", "-"]])
def test_nor_is_what_the_shell_has_opened(job: Path, files: list[str]) -> None:
    """`-i - -o in < in`, and `-i in -o - >> in`."""
    content = (job / "in").read_bytes()
    with open(job / "in", "ab+") as opened:
        opened.seek(0)
        streams = {"stdin": opened} if files[1] == "-" else {"stdout": opened}
        command = [sys.executable, "-m", "sidp_sgl.cli", "run-batch", *files, "--model", "/absent"]
        ended = subprocess.run(command, cwd=job, stderr=subprocess.PIPE, text=True, **streams)
    assert ended.returncode == 2 and "are one file: use another" in ended.stderr
    assert (job / "in").read_bytes() == content and os.listdir(job) == ["in"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["-i", "https://h/x.jsonl", "-o", "out"], "--input-file https://h/x.jsonl is a URL"),
        (["-i", "s3://b/x.jsonl", "-o", "out"], "--input-file s3://b/x.jsonl is a URL"),
        (["-i", "in", "-o", "s3://b/out"], "--output-file s3://b/out is a URL"),
        (["-i", "in", "-o", "-", "--retry-errors"], "--retry-errors does not go with"),
    ],
)
def test_what_no_file_can_be(engines: list[Process], capsys, files: list[str], reason: str) -> None:
    assert cli.main(["run-batch", *files, "--dtype", "auto"]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert not engines and not os.path.exists("out")


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_folder_is_no_output(job: Path, engines: list[Process], capsys, name: str) -> None:
    assert cli.main(["run-batch", "-i", str(job / "in"), "-o", name, "--dtype", "auto"]) == 2
    error = capsys.readouterr().err
    assert "Is a directory" in error and error.count("\n") == 1 and not engines


def test_no_standard_input(job: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after `<&-`
    assert cli.main(["run-batch", "-i", "-", "-o", str(job / "out"), "--dtype", "auto"]) == 2
    assert "--input-file - and standard input is closed" in capsys.readouterr().err
    assert os.listdir(job) == ["in"]


def test_standard_input_and_output(
    job: Path, engines: list[Process], capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gzip -c in | sidp-sgl run-batch -i - -o - > out`."""
    (job / "in.gz").write_bytes(gzip.compress((job / "in").read_bytes()))
    with open(job / "in.gz") as source:
        monkeypatch.setattr(sys, "stdin", source)
        assert cli.main(["run-batch", "-i", "-", "-o", "-", "--dtype", "auto"]) == 0
    output = capfd.readouterr()
    found = {record["custom_id"] for record in map(orjson.loads, output.out.splitlines())}
    assert found == {"a", "b", "c"}
    assert "3 of 3 requests done" in output.err
    assert sorted(os.listdir(job)) == ["in", "in.gz"]


def test_a_file_that_is_piped_continues(
    job: Path, engines: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        reading, writing = os.pipe()
        os.write(writing, (job / "in").read_bytes())
        os.close(writing)
        with open(reading) as source:
            monkeypatch.setattr(sys, "stdin", source)
            assert cli.main(["run-batch", "-i", "-", "-o", str(job / "out"), "--dtype", "a"]) == 0
    assert [engine.started for engine in engines] == [True, False]
    assert len(statuses(job)) == 3


def test_standard_output_that_nobody_reads(
    job: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as target:
        monkeypatch.setattr(sys, "stdout", target)
        assert cli.main(["run-batch", "-i", str(job / "in"), "-o", "-", "--dtype", "auto"]) == 1
        monkeypatch.undo()
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--output-file -: Broken pipe; what it has written is whole" in error


def test_no_standard_output(job: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert cli.main(["run-batch", "-i", str(job / "in"), "-o", "-", "--dtype", "auto"]) == 2
    assert "--output-file - and standard output is closed" in capsys.readouterr().err


def test_seeds_that_are_not_kept_to(job: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """One line, and none where SGLang does keep to them."""
    write_lines(
        job / "in", [line("a", seed=1), line("b", seed=2), line("c", seed=3, temperature=0)]
    )
    assert run(job) == 0
    warning = "2 requests have a seed, which SGLang keeps to with --enable-deterministic-inference"
    assert capsys.readouterr().err.count(warning) == 1
    look = Process.look

    def look_deterministic(engine: Process, timeout: float) -> dict[str, str]:
        return {**look(engine, timeout), DETERMINISTIC: "True"}

    monkeypatch.setattr(Process, "look", look_deterministic)
    (job / "out").unlink()
    assert run(job) == 0
    assert warning not in capsys.readouterr().err

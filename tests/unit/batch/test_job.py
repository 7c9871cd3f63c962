"""A job over an engine that answers in any order and may die: bounded, nothing lost or doubled."""

import io
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidp_sgl.batch import duplicates
from sidp_sgl.batch.errors import Interrupted, JobError
from sidp_sgl.batch.input import InputFile
from sidp_sgl.batch.job import Job, Limits
from sidp_sgl.batch.output import OutputFile
from sidp_sgl.batch.progress import Progress, Tally
from sidp_sgl.batch.resume import Done
from tests.support.jobs import FakeEngine, line, records, write_lines

LIMITS = Limits(max_in_flight=16, max_restarts=3)


class Run:
    """One run of the command's inner part over files in `folder`."""

    def __init__(
        self, folder: Path, limits: Limits = LIMITS, output: OutputFile | None = None
    ) -> None:
        input_file = InputFile(folder / "in")
        contents = input_file.check()
        self.output = output or OutputFile(folder / "out")
        self.done = Done(contents.num_lines)
        self.output.scan(self.done.add)
        self.text = io.StringIO()
        tally = Tally(contents.num_requests, self.done.num_records)
        self.progress = Progress(tally, self.text)
        requests = input_file.requests(self.done.__contains__)
        self.job = Job(requests, self.output, self.done, self.progress, limits)

    def start(self, engines: Iterable[FakeEngine], check_signals=lambda: None) -> None:
        """Closes the output, however the run ends."""
        waiting: Iterator[FakeEngine] = iter(engines)
        try:
            self.job.run(lambda: next(waiting), check_signals)
        finally:
            self.output.close()


def write_input(folder: Path, number: int) -> Path:
    return write_lines(folder / "in", (line(f"r{n}", f"{n}=") for n in range(number)))


def assert_complete(folder: Path, number: int) -> None:
    found = records(folder / "out")
    assert sorted(record["custom_id"] for record in found) == sorted(f"r{n}" for n in range(number))
    for record in found:
        prompt = record["custom_id"].removeprefix("r") + "="
        assert record["response"]["body"]["choices"][0]["text"] == f"answer to {prompt}"


def test_everything_is_answered_in_a_bounded_window(tmp_path: Path) -> None:
    write_input(tmp_path, 500)
    engine = FakeEngine()
    Run(tmp_path).start([engine])
    assert_complete(tmp_path, 500)
    assert engine.most_waiting == LIMITS.max_in_flight
    assert engine.is_closed


def test_the_window_is_bounded_in_bytes(tmp_path: Path) -> None:
    lines = (line(f"r{n}", f"{n}=" + " " * 1000) for n in range(100))
    longest = max(map(len, write_lines(tmp_path / "in", lines).read_bytes().splitlines())) + 1
    engine = FakeEngine()
    Run(tmp_path, Limits(max_in_flight=50, max_restarts=0, max_bytes=5 * longest)).start([engine])
    assert len(records(tmp_path / "out")) == 100
    assert 4 * longest < engine.most_bytes_waiting <= 6 * longest


def test_a_request_larger_than_the_window(tmp_path: Path) -> None:
    write_input(tmp_path, 5)
    Run(tmp_path, Limits(max_in_flight=50, max_restarts=0, max_bytes=1)).start([FakeEngine()])
    assert_complete(tmp_path, 5)


def test_a_dead_engine_is_replaced(tmp_path: Path) -> None:
    write_input(tmp_path, 100)
    engines = [FakeEngine(lives_for=20), FakeEngine(lives_for=0), FakeEngine()]
    run = Run(tmp_path)
    run.start(engines)
    assert_complete(tmp_path, 100)
    assert all(engine.is_closed for engine in engines)
    assert run.progress.tally.restarts == 2
    assert "starting the engine again (2 of at most 3 times): DP rank 1 was killed\n" in (
        run.text.getvalue()
    )
    # What was in the dead engine comes first, in the order in which it was sent.
    unanswered = engines[1].sent
    assert [request.line for request in unanswered] == sorted(
        request.line for request in unanswered
    )
    assert engines[2].sent[: len(unanswered)] == unanswered


def test_an_engine_that_dies_too_often(tmp_path: Path) -> None:
    write_input(tmp_path, 100)
    engines = [FakeEngine(lives_for=5) for _ in range(9)]
    with pytest.raises(JobError, match="after 3 restarts, --max-restarts"):
        Run(tmp_path).start(engines)
    assert sum(engine.is_closed for engine in engines) == 4
    assert len(records(tmp_path / "out")) == 20
    Run(tmp_path).start([FakeEngine()])
    assert_complete(tmp_path, 100)


def test_an_engine_that_never_starts_is_not_started_again(tmp_path: Path) -> None:
    write_input(tmp_path, 5)
    engines = [FakeEngine(lives_for=0, ready=False), FakeEngine()]
    with pytest.raises(JobError, match="did not start: DP rank 1 was killed"):
        Run(tmp_path).start(engines)
    assert not engines[1].sent


def test_error_records(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [line("a"), line("b", "bad"), line("c")])
    run = Run(tmp_path)
    run.start([FakeEngine()])
    found = {record["custom_id"]: record["response"] for record in records(tmp_path / "out")}
    assert {name: found[name]["status_code"] for name in found} == {"a": 200, "b": 400, "c": 200}
    assert found["b"]["body"]["error"]["message"] == "too long"
    assert run.done.num_errors == 1
    assert "1 of them error records" in run.progress.summary(run.done.num_errors)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run goes on."""


class KilledOutput(OutputFile):
    """The process dies after so many records, with so many bytes of the next one written."""

    def __init__(self, path: Path, num_records: int, num_bytes: int) -> None:
        super().__init__(path)
        self._left, self._num_bytes = num_records, num_bytes

    def append(self, records: Sequence[bytes]) -> None:
        whole = records[: self._left]
        self._left -= len(whole)
        super().append(whole)
        if len(whole) < len(records):
            torn = records[len(whole)][: self._num_bytes].rstrip(b"\n")
            with open(self.path, "ab") as file:
                file.write(torn)
            raise Killed


@settings(deadline=None)
@given(
    number=st.integers(1, 60),
    kills=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 80)), max_size=6),
    deaths=st.lists(st.integers(0, 20), max_size=3),
    seed=st.integers(0, 1000),
)
def test_kills_at_any_point(
    number: int, kills: list[tuple[int, int]], deaths: list[int], seed: int
) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_input(folder, number)
        num_finished = 0
        for kill in kills:
            run = Run(folder, output=KilledOutput(folder / "out", *kill))
            assert run.done.num_records == num_finished  # nothing that was finished is lost
            engines = [FakeEngine(seed, lives_for=lives) for lives in deaths]
            with suppress(Killed):
                run.start([*engines, FakeEngine(seed)])
            num_finished = (folder / "out").read_bytes().count(b"\n")
        run, engine = Run(folder), FakeEngine(seed)
        run.start([engine])
        assert len(engine.sent) == number - num_finished  # and nothing of it runs again
        assert_complete(folder, number)


def test_stopped_by_a_signal(tmp_path: Path) -> None:
    write_input(tmp_path, 100)
    calls = 0

    def check_signals() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Interrupted(2)

    engine = FakeEngine()
    with pytest.raises(Interrupted):
        Run(tmp_path).start([engine], check_signals)
    assert engine.is_closed
    assert len(records(tmp_path / "out")) == 4 * 8
    Run(tmp_path).start([FakeEngine()])
    assert_complete(tmp_path, 100)


def peak_bytes(folder: Path, number: int) -> int:
    """Of Python's memory, while a job is checked and run."""
    folder.mkdir()
    write_input(folder, number)
    tracemalloc.start()
    try:
        Run(folder).start([FakeEngine(per_call=16, keeps_sent=False)])
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million requests: bench/batch_memory.py."""
    monkeypatch.setattr(duplicates, "_BUFFER", 256)
    small, large = (peak_bytes(tmp_path / str(number), number) for number in (5_000, 20_000))
    assert large < small * 1.5
    assert len(records(tmp_path / "20000" / "out")) == 20_000

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

from sidp_sgl.batch.errors import Interrupted, JobError
from sidp_sgl.batch.files import duplicates
from sidp_sgl.batch.files.input import InputFile
from sidp_sgl.batch.files.output import OutputFile
from sidp_sgl.batch.files.request import Request
from sidp_sgl.batch.files.resume import Done
from sidp_sgl.batch.files.streams import NoJournal
from sidp_sgl.batch.job import Job
from sidp_sgl.batch.progress import Progress, Tally
from sidp_sgl.batch.suspects import Suspects
from sidp_sgl.batch.window import Bounds, Window
from tests.support.jobs import FakeEngine, line, records, write_lines

BOUNDS = Bounds(max_in_flight=16)


class Run:
    """One run of the command's inner part over files in `folder`."""

    def __init__(
        self,
        folder: Path,
        bounds: Bounds = BOUNDS,
        output: OutputFile | None = None,
        suspects: Suspects | None = None,
        max_restarts: int = 3,
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
        self.suspects = suspects or Suspects()
        window = Window(requests, bounds, self.suspects)
        self.job = Job(window, self.output, self.done, self.progress, NoJournal(), max_restarts)

    def start(self, engines: Iterable[FakeEngine], check_signals=lambda: None) -> None:
        """Closes the output, however the run ends."""
        waiting: Iterator[FakeEngine] = iter(engines)
        try:
            self.job.run(lambda: next(waiting), check_signals)
        finally:
            self.output.close()


def write_input(folder: Path, number: int) -> Path:
    return write_lines(folder / "in", (line(f"r{n}", f"{n}=") for n in range(number)))


def assert_complete(folder: Path, number: int, may_be_blamed: bool = False) -> None:
    """`may_be_blamed`: an engine that dies anyhow may have done so with a request alone in it."""
    found = records(folder / "out")
    assert sorted(record["custom_id"] for record in found) == sorted(f"r{n}" for n in range(number))
    for record in found:
        if may_be_blamed and record["response"]["status_code"] == 500:
            continue
        prompt = record["custom_id"].removeprefix("r") + "="
        assert record["response"]["body"]["choices"][0]["text"] == f"answer to {prompt}"


def test_everything_is_answered_in_a_bounded_window(tmp_path: Path) -> None:
    write_input(tmp_path, 500)
    engine = FakeEngine()
    Run(tmp_path).start([engine])
    assert_complete(tmp_path, 500)
    assert engine.most_waiting == BOUNDS.max_in_flight
    assert engine.is_closed


def test_the_window_is_bounded_in_bytes(tmp_path: Path) -> None:
    lines = (line(f"r{n}", f"{n}=" + " " * 1000) for n in range(100))
    longest = max(map(len, write_lines(tmp_path / "in", lines).read_bytes().splitlines())) + 1
    engine = FakeEngine()
    Run(tmp_path, Bounds(50, max_bytes=5 * longest)).start([engine])
    assert len(records(tmp_path / "out")) == 100
    assert 4 * longest < engine.most_bytes_waiting <= 6 * longest


def test_a_request_larger_than_the_window(tmp_path: Path) -> None:
    write_input(tmp_path, 5)
    Run(tmp_path, Bounds(50, max_bytes=1)).start([FakeEngine()])
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
    """Its requests run alone and end no engine: each end counts."""
    write_input(tmp_path, 200)
    engines = [FakeEngine(lives_for=30) for _ in range(9)]
    with pytest.raises(JobError, match="after 3 restarts, --max-restarts"):
        Run(tmp_path).start(engines)
    assert sum(engine.is_closed for engine in engines) == 4
    assert len(records(tmp_path / "out")) == 4 * 30 - 3  # less a probe per restart
    Run(tmp_path).start([FakeEngine()])
    assert_complete(tmp_path, 200)


def statuses(folder: Path) -> dict[str, int]:
    found = records(folder / "out")
    by_id = {record["custom_id"]: record["response"]["status_code"] for record in found}
    assert len(by_id) == len(found)
    return by_id


@settings(deadline=None)
@given(
    number=st.integers(1, 120),
    poisons=st.sets(st.integers(0, 119), max_size=10),
    window=st.integers(1, 130),
    seed=st.integers(0, 1000),
)
def test_requests_that_end_the_engine(
    number: int, poisons: set[int], window: int, seed: int
) -> None:
    """They get error records, all others their answers, and --max-restarts is not used up."""
    names = [("poison" if n in poisons else "good") + str(n) for n in range(number)]
    num_poisons = sum(name.startswith("poison") for name in names)
    with TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_lines(folder / "in", (line(name, name) for name in names))
        run = Run(folder, Bounds(window), max_restarts=2)
        engines = [FakeEngine(seed + n) for n in range(3 * num_poisons + 1)]
        run.start(engines)
        found = {record["custom_id"]: record["response"] for record in records(folder / "out")}
    assert sorted(found) == sorted(names)
    for name, response in found.items():
        if name.startswith("poison"):
            assert response["status_code"] == 500
            assert "has ended the engine, alone in it: DP" in response["body"]["error"]["message"]
        else:
            assert response["body"]["choices"] == [{"text": f"answer to {name}"}]
    steps = 2 if window <= 64 else 3
    assert run.progress.tally.restarts <= steps * num_poisons
    assert run.progress.tally.errors == run.done.num_errors == num_poisons


def test_no_engine_is_started_for_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [line("a", "poison")])
    engines = [FakeEngine(), FakeEngine(), FakeEngine()]
    Run(tmp_path).start(engines)
    assert statuses(tmp_path) == {"a": 500}
    assert not engines[2].sent and not engines[2].is_closed


def test_an_engine_that_answers_nothing_is_nobodys_fault(tmp_path: Path) -> None:
    """It does not survive a request that is known to be harmless."""
    write_input(tmp_path, 5)
    engines = [FakeEngine(lives_for=0) for _ in range(9)]
    with pytest.raises(JobError, match="after 3 restarts"):
        Run(tmp_path).start(engines)
    assert not records(tmp_path / "out")
    assert [request.line for request in engines[1].sent] == [0]


def test_too_many_requests_that_end_the_engine(tmp_path: Path) -> None:
    names = [f"poison{n}" for n in range(50)]
    write_lines(tmp_path / "in", (line(name, name) for name in names))
    run = Run(tmp_path)
    with pytest.raises(JobError, match="11 of 11 requests have ended the engine, which looks"):
        run.start(FakeEngine() for _ in range(100))
    assert statuses(tmp_path) == dict.fromkeys(names[:11], 500)


def test_what_was_in_killed_runs_is_suspect(tmp_path: Path) -> None:
    """As if the engine had ended then: groups become smaller, until a line is to blame."""
    write_input(tmp_path, 300)
    run = Run(tmp_path, Bounds(200))
    run.job.suspect_what_was_lost()
    assert run.suspects.ranges == [(1, 200, 14)]
    run.job.suspect_what_was_lost()
    assert run.suspects.ranges == [(1, 14, 1), (1, 200, 14)]
    run.job.suspect_what_was_lost()
    engine = FakeEngine()
    run.start([engine])
    assert [request.line for request in engine.sent] == [0, *range(2, 301)]
    assert engine.most_waiting == 100
    assert [name for name, status in statuses(tmp_path).items() if status == 500] == ["r0"]
    assert run.progress.tally.restarts == 0


def test_a_request_that_is_lost_on_the_way_is_missed(tmp_path: Path) -> None:
    write_input(tmp_path, 20)
    run = Run(tmp_path)
    window = run.job._window
    take = window.take

    def lose() -> Request | None:
        request = take()
        if request is not None and request.line == 7:
            window.finish(7)
            request = take()
        return request

    window.take = lose  # type: ignore[method-assign]
    with pytest.raises(JobError, match="1 requests have no record"):
        run.start([FakeEngine()])


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
        assert_complete(folder, number, may_be_blamed=bool(deaths))


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

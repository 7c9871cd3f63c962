"""Runs what is not done: a window of requests in the engine, a new engine for a dead one.

Knows neither sglang nor processes: an engine is what `start` returns.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from sidp_sgl.batch.errors import EngineEnded, JobError
from sidp_sgl.batch.files.records import Answer, Record, error_body, write_record
from sidp_sgl.batch.files.request import COMPLETIONS, Request
from sidp_sgl.batch.files.resume import Done
from sidp_sgl.batch.progress import EngineStatus, Progress
from sidp_sgl.batch.suspects import Suspects
from sidp_sgl.batch.window import Window

_WAIT_SECONDS = 0.2  # how long a signal may go unnoticed
_SERVER_ERROR = 500
# More of the requests than this end the engine: it is not their fault.
_MOST_BLAMED, _MOST_BLAMED_SHARE = 10, 0.01
# Shows that an engine works before a request can be blamed for its end; gets no record.
_PROBE = Request(0, "", COMPLETIONS, b'{"prompt": "1", "max_tokens": 1, "temperature": 0}', 0)


class Engine(Protocol):
    """Answers requests in any order. After `EngineEnded` it is only closed."""

    is_ready: bool  # has started
    status: EngineStatus

    def send(self, request: Request) -> None: ...

    def receive(self, timeout: float) -> list[Answer]:
        """What has been answered, at the latest after `timeout` seconds; raises EngineEnded."""
        ...

    def close(self) -> None: ...


class Output(Protocol):
    """Where records go; every method may raise JobError."""

    def append(self, records: Sequence[bytes]) -> None: ...

    def sync_group(self) -> None: ...

    def sync(self) -> None: ...


class Journal(Protocol):
    """What the next run has to know; may raise JobError."""

    def note(self, suspects: Suspects, is_running: bool) -> None:
        """`is_running`: whether an engine has requests of this job."""
        ...


class Job:
    """One run over the requests that are not done yet."""

    def __init__(
        self,
        window: Window,
        output: Output,
        done: Done,
        progress: Progress,
        journal: Journal,
        max_restarts: int,
    ) -> None:
        self._window = window
        self._suspects = window.suspects
        self._output = output
        self._done = done
        self._progress = progress
        self._journal = journal
        self._max_restarts = max_restarts
        self._engine_works = False  # it has answered something
        self._is_probing = False
        self._num_blamed = 0

    def suspect_what_was_lost(self) -> None:
        """Runs before this one have ended without a word: what they had in the engine is suspect,
        as if the engine alone had ended."""
        while self._window.take() is not None:
            pass
        reason = "runs of this job were killed, more than once in a row"
        self._find_suspects(list(self._window.in_flight), reason, counts=False)

    def run(self, start: Callable[[], Engine], check_signals: Callable[[], None]) -> None:
        """Until everything is done. Raises JobError, and what `check_signals` raises."""
        try:
            while self._window.has_next():
                engine = start()
                try:
                    self._drive(engine, check_signals)
                finally:
                    engine.close()
            self._check_that_all_is_done()
        finally:
            self._output.sync()

    def _drive(self, engine: Engine, check_signals: Callable[[], None]) -> None:
        """Until everything is done, or the engine has ended."""
        self._engine_works = self._is_probing = False
        try:
            while not engine.is_ready:
                check_signals()
                engine.receive(_WAIT_SECONDS)
                self._progress.tick()
            self._journal.note(self._suspects, is_running=True)
            while True:
                check_signals()
                self._send(engine)
                if not (self._window.in_flight or self._is_probing):
                    return
                self._receive(engine)
        except EngineEnded as ended:
            self._engine_ended(ended, engine.is_ready)
        finally:
            with suppress(JobError):  # else the next run takes this one for killed
                self._journal.note(self._suspects, is_running=False)

    def _send(self, engine: Engine) -> None:
        if self._is_probing:
            return
        is_idle = not self._window.in_flight
        if is_idle and not self._engine_works and self._window.next_runs_alone():
            self._is_probing = True
            engine.send(_PROBE)
            return
        while (request := self._window.take()) is not None:
            engine.send(request)

    def _receive(self, engine: Engine) -> None:
        answers = engine.receive(_WAIT_SECONDS)
        self._progress.tally.status = engine.status
        if answers:
            self._engine_works = True
            if self._is_probing:
                self._is_probing = False
            else:
                self._finish(answers)
        self._output.sync_group()
        self._progress.tick()

    def _finish(self, answers: list[Answer]) -> None:
        """Append first: what is counted as done is in the file."""
        in_flight = self._window.in_flight
        self._output.append(
            [write_record(in_flight[answer.line].custom_id, answer) for answer in answers]
        )
        for answer in answers:
            self._window.finish(answer.line)
            self._done.add(Record(answer.line, answer.is_error))
            self._progress.tally.count(answer)

    def _engine_ended(self, ended: EngineEnded, was_ready: bool) -> None:
        """Raises JobError where no other engine shall be started."""
        tally = self._progress.tally
        tally.engine_ended()
        if not was_ready and not tally.restarts:
            raise JobError(f"the engine did not start: {ended}")
        has_culprit = self._find_suspects(list(self._window.in_flight), str(ended))
        num_ends = self._suspects.num_unexplained
        if num_ends > self._max_restarts:
            raise JobError(
                f"{ended}; that was after {num_ends - 1} restarts, --max-restarts allows no more"
            )
        if self._num_blamed > _MOST_BLAMED + _MOST_BLAMED_SHARE * tally.finished:
            raise JobError(
                f"{self._num_blamed:,} of {tally.finished:,} requests have ended the engine, which "
                f"looks like its own fault: {ended}"
            )
        tally.restarts += 1
        if not has_culprit:
            self._progress.say(
                f"starting the engine again ({num_ends} of at most {self._max_restarts} times): "
                f"{ended}"
            )

    def _find_suspects(self, in_flight: list[int], reason: str, counts: bool = True) -> bool:
        """Whether one line is to blame, which then has its record; all others are sent again."""
        blamed = self._suspects.engine_ended(in_flight, counts)
        if blamed is not None:
            self._blame(blamed, reason)
        elif in_flight:
            *_, size = self._suspects.ranges[0]
            self._progress.say(
                f"{len(in_flight):,} requests were in the engine when it ended: they run "
                f"{f'{size} at a time' if size > 1 else 'one by one'}, to find the one that did it"
            )
        self._window.put_back()
        return blamed is not None

    def _blame(self, line: int, reason: str) -> None:
        self._num_blamed += 1
        self._progress.say(
            f"line {line} ({self._window.in_flight[line].custom_id}) has ended the engine, alone "
            f"in it: it gets an error record, and the job goes on: {reason}"
        )
        message = f"this request has ended the engine, alone in it: {reason}"
        body = error_body(message, "server_error", _SERVER_ERROR)
        self._finish([Answer(line, _SERVER_ERROR, body)])

    def _check_that_all_is_done(self) -> None:
        tally = self._progress.tally
        if missing := tally.num_requests - self._done.num_records:
            raise JobError(f"{missing:,} requests have no record: report it with the log")

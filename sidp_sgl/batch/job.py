"""Runs what is not done: a bounded window of requests in the engine, a new engine for a dead one.

Knows neither sglang nor processes: an engine is what `start` returns.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from sidp_sgl.batch.errors import EngineEnded, JobError
from sidp_sgl.batch.output import OutputFile
from sidp_sgl.batch.progress import EngineStatus, Progress
from sidp_sgl.batch.records import Answer, Record, write_record
from sidp_sgl.batch.request import Request
from sidp_sgl.batch.resume import Done

_WAIT_SECONDS = 0.2  # how long a signal may go unnoticed


class Engine(Protocol):
    """Answers requests in any order. After `EngineEnded` it is only closed."""

    is_ready: bool  # has started; requests that were sent before wait for that
    status: EngineStatus

    def send(self, request: Request) -> None: ...

    def receive(self, timeout: float) -> list[Answer]:
        """What has been answered, at the latest after `timeout` seconds; raises EngineEnded."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Limits:
    """How much of the input is in memory at a time, and how often an engine may end."""

    max_in_flight: int  # requests in the engine; as many again wait to be sent
    max_restarts: int
    max_bytes: int = 256 * 2**20  # of the lines of either


class Job:
    """One run over the requests that are not done yet."""

    def __init__(
        self,
        requests: Iterator[Request],
        output: OutputFile,
        done: Done,
        progress: Progress,
        limits: Limits,
    ) -> None:
        self._requests = requests
        self._output = output
        self._done = done
        self._progress = progress
        self._limits = limits
        # Not yet sent, in the order of the input: the engine's dispatch finds a better one.
        self._next: deque[Request] = deque()
        self._in_flight: dict[int, Request] = {}  # by line
        self._bytes_in_flight = 0

    def run(self, start: Callable[[], Engine], check_signals: Callable[[], None]) -> None:
        """Until everything is done. Raises JobError, and what `check_signals` raises."""
        tally = self._progress.tally
        try:
            while True:
                engine = start()
                try:
                    self._drive(engine, check_signals)
                    return
                except EngineEnded as ended:
                    self._take_back()
                    tally.engine_ended()
                    if not engine.is_ready and not tally.restarts:
                        raise JobError(f"the engine did not start: {ended}") from None
                    if tally.restarts >= self._limits.max_restarts:
                        raise self._too_often(ended) from None
                    tally.restarts += 1
                    self._progress.say(
                        f"starting the engine again ({tally.restarts} of at most "
                        f"{self._limits.max_restarts} times): {ended}"
                    )
                finally:
                    engine.close()
        finally:
            self._output.sync()

    def _drive(self, engine: Engine, check_signals: Callable[[], None]) -> None:
        while True:
            check_signals()
            self._fill(engine)
            if not self._in_flight:
                return
            answers = engine.receive(_WAIT_SECONDS)
            self._progress.tally.status = engine.status
            if answers:
                self._finish(answers)
            self._output.sync_group()
            self._progress.tick()

    def _fill(self, engine: Engine) -> None:
        while not self._is_full(len(self._in_flight), self._bytes_in_flight):
            if not self._next:
                self._next.extend(self._read_window())
            if not self._next:
                return
            request = self._next.popleft()
            self._in_flight[request.line] = request
            self._bytes_in_flight += request.num_bytes
            engine.send(request)

    def _read_window(self) -> list[Request]:
        window: list[Request] = []
        num_bytes = 0
        while not self._is_full(len(window), num_bytes):
            request = next(self._requests, None)
            if request is None:
                break
            window.append(request)
            num_bytes += request.num_bytes
        return window

    def _is_full(self, number: int, num_bytes: int) -> bool:
        return number >= self._limits.max_in_flight or num_bytes >= self._limits.max_bytes

    def _finish(self, answers: list[Answer]) -> None:
        """Append first: what is counted as done is in the file."""
        requests = [self._in_flight[answer.line] for answer in answers]
        self._output.append(
            [
                write_record(request.custom_id, answer)
                for request, answer in zip(requests, answers, strict=True)
            ]
        )
        for request, answer in zip(requests, answers, strict=True):
            del self._in_flight[request.line]
            self._bytes_in_flight -= request.num_bytes
            self._done.add(Record(answer.line, answer.is_error))
            self._progress.tally.count(answer)

    def _take_back(self) -> None:
        """What the engine has not answered is sent to the next one first."""
        self._next.extendleft(reversed(self._in_flight.values()))
        self._in_flight.clear()
        self._bytes_in_flight = 0

    def _too_often(self, ended: EngineEnded) -> JobError:
        restarts = self._progress.tally.restarts
        return JobError(
            f"{ended}; that was after {restarts} restarts, --max-restarts allows no more: "
            "run the same command again to continue"
        )

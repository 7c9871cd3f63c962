"""Which requests are in the engine, and which come next: bounded in number and bytes."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from sidp_sgl.batch.files.request import Request
from sidp_sgl.batch.suspects import Suspects


@dataclass(frozen=True)
class Bounds:
    """Of what is in the engine; as much again waits to be sent."""

    max_in_flight: int  # requests
    max_bytes: int = 256 * 2**20  # of their lines


class Window:
    """Sends in the order of the input: the engine's dispatch finds a better one."""

    def __init__(self, requests: Iterator[Request], bounds: Bounds, suspects: Suspects) -> None:
        self._requests = requests
        self._bounds = bounds
        self.suspects = suspects
        self._next: deque[Request] = deque()
        self._num_bytes = 0
        self.in_flight: dict[int, Request] = {}  # by line, in the order of the input

    def has_next(self) -> bool:
        if not self._next:
            self._next.extend(self._read())
        return bool(self._next)

    def next_runs_alone(self) -> bool:
        """Whether the next request is to blame if the engine ends with it."""
        return self.has_next() and self.suspects.runs_alone(self._next[0].line)

    def take(self) -> Request | None:
        """The next one to send, in flight from now on; None where none may be sent yet."""
        if self._is_full(len(self.in_flight), self._num_bytes) or not self.has_next():
            return None
        if not self.suspects.may_join(self._next[0].line, self.in_flight):
            return None
        request = self._next.popleft()
        self.in_flight[request.line] = request
        self._num_bytes += request.num_bytes
        return request

    def finish(self, line: int) -> None:
        self._num_bytes -= self.in_flight.pop(line).num_bytes

    def put_back(self) -> None:
        """What the engine has not answered comes next."""
        self._next.extendleft(reversed(self.in_flight.values()))
        self.in_flight.clear()
        self._num_bytes = 0

    def _read(self) -> list[Request]:
        found: list[Request] = []
        num_bytes = 0
        while not self._is_full(len(found), num_bytes):
            request = next(self._requests, None)
            if request is None:
                break
            found.append(request)
            num_bytes += request.num_bytes
        return found

    def _is_full(self, number: int, num_bytes: int) -> bool:
        return number >= self._bounds.max_in_flight or num_bytes >= self._bounds.max_bytes

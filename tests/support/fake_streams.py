"""Streams and events of the fake driver: threads that work in order, or graphs that grow."""

import threading
from collections import deque
from collections.abc import Callable

from sidp_sgl.weightpool.transport.shm.transport import ShmEvent
from tests.support.fake_graph import FakeGraph

Work = Callable[[], None]


class FakeStream:
    """A thread that executes what is enqueued, in order."""

    def __init__(self) -> None:
        self.graph: FakeGraph | None = None  # while it captures
        self.failure: BaseException | None = None
        self._work: deque[Work | None] = deque()
        self._changed = threading.Condition()
        self._unfinished = 0
        threading.Thread(target=self._run, daemon=True).start()

    def enqueue(self, work: Work | None) -> None:
        with self._changed:
            self._unfinished += 1
            self._work.append(work)
            self._changed.notify_all()

    def is_idle(self) -> bool:
        return self._unfinished == 0 or self.failure is not None

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._work:
                    self._changed.wait()
                work = self._work.popleft()
            if work is None:
                return
            try:
                work()
            except BaseException as failure:
                self.failure = failure
                return
            self._unfinished -= 1


class FakeEvent(ShmEvent):
    """Its latest mark is one of a stream, or a node of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.graph: FakeGraph | None = None
        self.nodes: frozenset[int] = frozenset()

"""The control planes of several ranks in one process, over real sockets."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sidp_sgl.scheduler.control import ControlThread, SchedulerControl
from sidp_sgl.scheduler.messages import CasRelease, CasRequest, Message
from sidp_sgl.scheduler.modes.leases import LeaseLedger
from sidp_sgl.scheduler.state import RankState

AMPLE_SECONDS = 10.0  # for answers that do come


class Rank:
    """One rank: its thread and its scheduler's end. `refusal`: why it does not serve, if so."""

    def __init__(
        self, rank: int, num_ranks: int, engine: str, owners: list[int], capacity_rows: int
    ) -> None:
        self.refusal: str | None = None
        self.ledger = LeaseLedger(capacity_rows)
        self.thread = ControlThread(
            rank, num_ranks, engine, self.ledger, refusal=lambda: self.refusal
        )
        self.control = SchedulerControl(rank, num_ranks, engine, owners)
        self.sent: list[tuple[int, Message]] = []  # by the scheduler's end, to one rank each
        self.loses_releases = False
        self._send, self.control._outbox.send = self.control._outbox.send, self._record

    def _record(self, to: int, message: Message) -> None:
        self.sent.append((to, message))
        if not (self.loses_releases and isinstance(message, CasRelease)):
            self._send(to, message)

    @property
    def requests(self) -> list[tuple[int, CasRequest]]:
        return [(to, message) for to, message in self.sent if isinstance(message, CasRequest)]


@contextmanager
def ranks_in(
    engine: str,
    num_ranks: int,
    *,
    capacity_rows: int = 64,
    is_listening: Callable[[int], bool] = lambda rank: True,
) -> Iterator[list[Rank]]:
    """Every rank needs all others. The threads of those that are not listening are not started."""
    ranks = [
        Rank(n, num_ranks, engine, [o for o in range(num_ranks) if o != n], capacity_rows)
        for n in range(num_ranks)
    ]
    for number, rank in enumerate(ranks):
        if is_listening(number):
            rank.thread.start()
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.thread._stopped = True  # all at once: each takes up to a poll to see it
        for rank in ranks:
            rank.thread.close()
            rank.control.close()


def wait_until(condition: Callable[[], bool], seconds: float = AMPLE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def make_state(rank: int, number: int, running: int = 1) -> RankState:
    return RankState(rank, number, running, 0, 0, 64, 1600, 800, 0.01, "was")

"""Lease servers and clients of several ranks in one process, over real sockets."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sidp_sgl.scheduler.messages import LeaseRequest, Message
from sidp_sgl.scheduler.modes.lease_client import LeaseClient
from sidp_sgl.scheduler.modes.lease_server import LeaseServer

AMPLE_SECONDS = 10.0  # for answers that do come


class Rank:
    """One rank: its server and its client. `refusal`: why it does not serve, if so."""

    def __init__(
        self, rank: int, num_ranks: int, engine: str, owners: list[int], rows_per_rank: int
    ) -> None:
        self.refusal: str | None = None
        self.server = LeaseServer(rank, num_ranks, engine, refusal=lambda: self.refusal)
        self.server.rows_per_rank = rows_per_rank
        self.client = LeaseClient(rank, engine, owners)
        self.sent: list[tuple[int, Message]] = []  # by the client
        self._send, self.client.outbox.send = self.client.outbox.send, self._record  # type: ignore[method-assign]

    def _record(self, to: int, message: Message) -> None:
        self.sent.append((to, message))
        self._send(to, message)

    @property
    def requests(self) -> list[tuple[int, LeaseRequest]]:
        return [(to, message) for to, message in self.sent if isinstance(message, LeaseRequest)]


@contextmanager
def ranks_in(
    engine: str,
    num_ranks: int,
    *,
    rows_per_rank: int = 64,
    is_listening: Callable[[int], bool] = lambda rank: True,
) -> Iterator[list[Rank]]:
    """Every rank needs all others. The threads of those that are not listening are not started."""
    ranks = [
        Rank(n, num_ranks, engine, [o for o in range(num_ranks) if o != n], rows_per_rank)
        for n in range(num_ranks)
    ]
    for number, rank in enumerate(ranks):
        if is_listening(number):
            rank.server.start()
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.server._stopped = True  # all at once: each takes up to a poll to see it
        for rank in ranks:
            rank.server.close()
            rank.client.close()


def wait_until(condition: Callable[[], bool], seconds: float = AMPLE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)

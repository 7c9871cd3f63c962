"""The thread that leases a rank's staging rows to the others, whatever its scheduler is doing."""

import threading
from collections import Counter
from collections.abc import Callable

from sidp_sgl.scheduler import bus
from sidp_sgl.scheduler.messages import LeaseDecline, LeaseRequest
from sidp_sgl.scheduler.modes.leases import answer

_POLL_SECONDS = 1.0


class LeaseServer:
    """`refusal()` says why this rank can't serve now, or None; called by the thread."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        engine: str,
        refusal: Callable[[], str | None],
    ) -> None:
        self.refusal = refusal
        self.declines: Counter[str] = Counter()  # given, by reason
        self._rank = rank
        self.rows_per_rank = 0
        self._peers = [peer for peer in range(num_ranks) if peer != rank]
        self.inbox = bus.Inbox(bus.requests_address(engine, rank))
        self.outbox = bus.Outbox({n: bus.answers_address(engine, n) for n in self._peers})
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="sidp-leases", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped:
            message = self.inbox.receive(_POLL_SECONDS)
            if isinstance(message, LeaseRequest) and message.rank in self._peers:
                said = answer(self._rank, message, self.rows_per_rank, self.refusal())
                if isinstance(said, LeaseDecline):
                    self.declines[said.reason] += 1
                self.outbox.send(message.rank, said)
        self.inbox.close()
        self.outbox.close()

    def close(self) -> None:
        self._stopped = True
        if self._thread.is_alive():
            self._thread.join(2 * _POLL_SECONDS)

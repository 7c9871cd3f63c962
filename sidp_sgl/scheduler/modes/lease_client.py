"""The scheduler's end of the leases: asks the owners, and waits a few milliseconds."""

import time
from collections.abc import Sequence

from sidp_sgl.scheduler import bus
from sidp_sgl.scheduler.messages import LeaseDecline, LeaseGrant
from sidp_sgl.scheduler.modes.negotiation import Negotiation


class LeaseClient:
    """`ranks`: the others of the group. For the scheduler's thread."""

    def __init__(self, rank: int, engine: str, ranks: Sequence[int]) -> None:
        self.negotiation = Negotiation(rank, ranks)
        self.silences = 0  # requests whose answers did not come in time
        self.wait_seconds = 0.0
        self.inbox = bus.Inbox(bus.answers_address(engine, rank))
        self.outbox = bus.Outbox({n: bus.requests_address(engine, n) for n in ranks})

    def need(self, owners: Sequence[int]) -> None:
        """Ask no others than `owners` from now on: those that a CaS step needs."""
        self.negotiation.owners = tuple(owners)

    def ask(self, rows: int) -> None:
        """Ask all owners to lease `rows` staging rows for the next step."""
        self._receive()
        for owner, request in self.negotiation.begin(rows):
            self.outbox.send(owner, request)

    def acquire(self, rows: int, seconds: float) -> bool:
        """Whether all owners lease at least `rows` rows: not after a decline, or where one was
        silent for `seconds`."""
        started = time.monotonic()
        if self.negotiation.rows < rows:
            self.ask(rows)
        self._receive()
        while not self.negotiation.is_decided:
            left = started + seconds - time.monotonic()
            if left <= 0:
                self.silences += 1
                break
            if (message := self.inbox.receive(left)) is not None:
                self._take(message)
        self.wait_seconds += time.monotonic() - started
        if self.negotiation.is_granted:
            return True
        self.release()
        return False

    def release(self) -> None:
        """Forget what is leased or asked for."""
        self.negotiation.abandon()

    def _receive(self) -> None:
        for message in self.inbox.drain():
            self._take(message)

    def _take(self, message: object) -> None:
        if isinstance(message, LeaseGrant | LeaseDecline):
            self.negotiation.on_message(message)

    def close(self) -> None:
        self.inbox.close()
        self.outbox.close()

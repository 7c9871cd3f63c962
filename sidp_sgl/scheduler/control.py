"""One rank's control plane: a thread that answers the other ranks, and the scheduler's own end.

Room: scheduler. The thread leases staging rows and keeps every rank's latest state, whatever the
scheduler is doing; the scheduler's end asks for leases and publishes. Nothing here is waited for
but the answers to a request, and those for a few milliseconds.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from sidp_sgl.scheduler import bus
from sidp_sgl.scheduler.messages import (
    CasDecline,
    CasGrant,
    CasRelease,
    CasRequest,
    DispatchUpdate,
    Recall,
    StateUpdate,
)
from sidp_sgl.scheduler.modes.leases import LeaseLedger
from sidp_sgl.scheduler.modes.negotiation import Negotiation
from sidp_sgl.scheduler.state import GroupState, RankState, is_worth_publishing

_POLL_SECONDS = 1.0
_CONTROLLER = -1  # its key among the ranks


class ControlThread:
    """Answers the other ranks. `refusal()` says why this rank can't serve now, or None."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        engine: str,
        ledger: LeaseLedger,
        refusal: Callable[[], str | None],
    ) -> None:
        self.group = GroupState()
        self.declines: dict[str, int] = {}  # given, by reason
        self.dispatch = DispatchUpdate(0, 0, 0)  # the DP controller's latest
        self.recalled = 0  # requests that the DP controller wants back; the scheduler sets it to 0
        self._rank = rank
        self._ledger = ledger
        self._refusal = refusal
        self.inbox = bus.Inbox(bus.control_address(engine, rank))
        self._answers = bus.Outbox(
            {peer: bus.answer_address(engine, peer) for peer in range(num_ranks) if peer != rank}
        )
        self._peers = {peer for peer in range(num_ranks) if peer != rank}
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="sidp-control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def sent(self) -> int:
        """Answers to the other ranks."""
        return self._answers.sent

    def _run(self) -> None:
        while not self._stopped:
            message = self.inbox.receive(_POLL_SECONDS)
            match message:
                case CasRequest() if message.rank in self._peers:
                    answer = self._ledger.request(self._rank, message, self._refusal())
                    if isinstance(answer, CasDecline):
                        self.declines[answer.reason] = self.declines.get(answer.reason, 0) + 1
                    self._answers.send(message.rank, answer)
                case CasRelease():
                    self._ledger.release(message)
                case StateUpdate(state):
                    self.group.update(state)
                case Recall(requests):
                    self.recalled = requests
                case DispatchUpdate():
                    self.dispatch = message
        self.inbox.close()
        self._answers.close()

    def close(self) -> None:
        self._stopped = True
        if self._thread.is_alive():
            self._thread.join(2 * _POLL_SECONDS)


class SchedulerControl:
    """The scheduler thread's end. `owners`: the ranks that this one needs in a CaS step."""

    def __init__(self, rank: int, num_ranks: int, engine: str, owners: Sequence[int]) -> None:
        self.negotiation = Negotiation(rank, owners)
        self.silences = 0  # requests whose answers did not come in time
        self.wait_seconds = 0.0
        self._inbox = bus.Inbox(bus.answer_address(engine, rank))
        peers = {n: bus.control_address(engine, n) for n in range(num_ranks) if n != rank}
        self._outbox = bus.Outbox({**peers, _CONTROLLER: bus.controller_address(engine)})
        self._published: RankState | None = None
        self._published_at = 0.0

    @property
    def sent(self) -> int:
        """Messages to other ranks and the controller."""
        return self._outbox.sent

    @property
    def dropped(self) -> int:
        """Messages that could not be sent, for their receiver is stopped."""
        return self._outbox.dropped

    @property
    def malformed(self) -> int:
        return self._inbox.malformed

    def publish(self, state: RankState, now: float) -> None:
        """Send `state` to all ranks and the controller, if it tells enough that is new."""
        if is_worth_publishing(self._published, self._published_at, state, now):
            self._outbox.send_to_all(StateUpdate(state))
            self._published, self._published_at = state, now

    def ask(self, rows: int) -> None:
        """Ask all owners to lease `rows` staging rows for the next step."""
        self._receive()
        for owner, request in self.negotiation.begin(rows):
            self._outbox.send(owner, request)

    def leases(self, rows: int, seconds: float) -> Mapping[int, int] | None:
        """Owner → first row of a lease of at least `rows` rows; None after a decline, or where
        an owner was silent for `seconds`."""
        started = time.monotonic()
        if self.negotiation.rows < rows:
            self.ask(rows)
        self._receive()
        while not self.negotiation.is_decided:
            left = started + seconds - time.monotonic()
            if left <= 0:
                self.silences += 1
                break
            if (message := self._inbox.receive(left)) is not None:
                self._take(message)
        self.wait_seconds += time.monotonic() - started
        if self.negotiation.is_granted:
            return self.negotiation.offsets
        self.release()
        return None

    def release(self) -> None:
        """Give back what is leased or asked for."""
        for owner, release in self.negotiation.abandon():
            self._outbox.send(owner, release)

    def _receive(self) -> None:
        for message in self._inbox.drain():
            self._take(message)

    def _take(self, message: object) -> None:
        if isinstance(message, CasGrant | CasDecline):
            for owner, release in self.negotiation.on_message(message):
                self._outbox.send(owner, release)

    def close(self) -> None:
        self._inbox.close()
        self._outbox.close()

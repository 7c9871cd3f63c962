"""A rank's end of the dispatch: its states go to the DP controller, and recalls come back."""

from sidp_sgl.scheduler import bus
from sidp_sgl.scheduler.messages import DispatchUpdate, RankState, Recall

_DRIFT_PARTS = 16  # a headroom that moved by this part of the capacity is news
_REPEAT_SECONDS = 0.1  # small changes are published at most this often


class ControllerLink:
    """For the scheduler's thread. Nothing is waited for."""

    def __init__(self, rank: int, engine: str) -> None:
        self.update = DispatchUpdate(0, 0, 0)  # the controller's latest
        self.inbox = bus.Inbox(bus.dispatch_address(engine, rank))
        self.outbox = bus.Outbox({0: bus.states_address(engine)})
        self._published: RankState | None = None
        self._published_at = 0.0

    def publish(self, state: RankState, now: float) -> None:
        """Send `state`, if it tells enough that is new; `now` in seconds."""
        if is_worth_publishing(self._published, self._published_at, state, now):
            self.outbox.send_to_all(state)
            self._published, self._published_at = state, now

    def recalled(self) -> int:
        """Requests that the controller wants back, as it has said since this was last called."""
        requests = 0
        for message in self.inbox.drain():
            match message:
                case Recall():
                    requests = message.requests
                case DispatchUpdate():
                    self.update = message
        return requests

    def close(self) -> None:
        self.inbox.close()
        self.outbox.close()


def is_worth_publishing(
    published: RankState | None, published_at: float, state: RankState, now: float
) -> bool:
    """Whether the controller should hear of `state`, after `published` at time `published_at`.

    What dispatch decides by is news at once; a headroom that moves by a few tokens per step can
    wait a little. Times in seconds.
    """
    if published is None or _decisive(state) != _decisive(published):
        return True
    drift = abs(state.kv_headroom_tokens - published.kv_headroom_tokens)
    if drift == 0:
        return False
    is_large = drift * _DRIFT_PARTS >= state.kv_capacity_tokens
    return is_large or now - published_at >= _REPEAT_SECONDS


def _decisive(state: RankState) -> tuple[int, ...]:
    return (
        state.running_batch_size,
        state.waiting_requests,
        state.received,
        state.kv_capacity_tokens,
    )

"""What every rank says of itself, and the latest of all ranks.

Room: scheduler. Pure: time comes in as an argument.
"""

from dataclasses import dataclass

_DRIFT_PARTS = 16  # a headroom that moved by this part of the capacity is news
_REPEAT_SECONDS = 0.1  # small changes are published at most this often


@dataclass(frozen=True)
class RankState:
    """One rank after one of its scheduler's iterations."""

    rank: int
    number: int  # increases with every publication of the rank
    running_batch_size: int
    waiting_requests: int
    received: int  # requests that the DP controller has sent and the rank has read
    max_running_requests: int
    kv_capacity_tokens: int
    kv_headroom_tokens: int  # free + evictable
    step_seconds: float  # a recent decode step; 0.0 where none is known
    mode: str  # "was" or "cas"


class GroupState:
    """The latest state of every rank that has published one.

    One thread writes, any thread reads: each update is one assignment to a dict, and each read
    one copy out of it, which CPython does not interleave.
    """

    def __init__(self) -> None:
        self._states: dict[int, RankState] = {}

    def update(self, state: RankState) -> bool:
        """False where `state` is not newer than what is known of its rank; it is dropped then."""
        known = self._states.get(state.rank)
        if known is not None and state.number <= known.number:
            return False
        self._states[state.rank] = state
        return True

    def of(self, rank: int) -> RankState | None:
        return self._states.get(rank)

    def all(self) -> list[RankState]:
        """The known states, by rank."""
        return sorted(list(self._states.values()), key=lambda state: state.rank)


def is_worth_publishing(
    published: RankState | None, published_at: float, state: RankState, now: float
) -> bool:
    """Whether others should hear of `state`, after `published` at time `published_at` (seconds).

    What dispatch and negotiation decide by is news at once; a headroom that moves by a few tokens
    per step, and step times, can wait a little.
    """
    if published is None or _decisive(state) != _decisive(published):
        return True
    drift = abs(state.kv_headroom_tokens - published.kv_headroom_tokens)
    if drift == 0 and state.step_seconds == published.step_seconds:
        return False
    if drift > 0 and drift * _DRIFT_PARTS >= state.kv_capacity_tokens:
        return True
    return now - published_at >= _REPEAT_SECONDS


def _decisive(state: RankState) -> tuple[int, int, int, int, str]:
    return (
        state.running_batch_size,
        state.waiting_requests,
        state.received,
        state.kv_capacity_tokens,
        state.mode,
    )

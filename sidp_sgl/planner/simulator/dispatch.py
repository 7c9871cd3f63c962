"""Which rank, or which group, gets a request; by SGLang's names of the methods.

Room: planner; pure.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

ROUND_ROBIN, TOTAL_REQUESTS, TOTAL_TOKENS = "round_robin", "total_requests", "total_tokens"
METHODS = (ROUND_ROBIN, TOTAL_REQUESTS, TOTAL_TOKENS)


class Target(Protocol):
    """What a dispatcher sees of a rank or a group; at once, without a message's way."""

    @property
    def num_requests(self) -> int:
        """Running and waiting."""

    @property
    def num_tokens(self) -> int:
        """In the KV cache, and of the waiting requests' prompts."""


T = TypeVar("T", bound=Target)


class Dispatcher:
    """Remembers nothing but whose turn it is."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._turn = 0

    def choose(self, targets: Sequence[T]) -> T:
        """Among equals the first."""
        if self._method == TOTAL_REQUESTS:
            return min(targets, key=lambda target: target.num_requests)
        if self._method == TOTAL_TOKENS:
            return min(targets, key=lambda target: target.num_tokens)
        chosen = targets[self._turn % len(targets)]
        self._turn += 1
        return chosen

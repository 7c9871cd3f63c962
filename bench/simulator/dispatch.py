"""Which rank, or which group, gets a request; by SGLang's names of the methods."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

ROUND_ROBIN, TOTAL_REQUESTS, TOTAL_TOKENS = "round_robin", "total_requests", "total_tokens"
METHODS = (ROUND_ROBIN, TOTAL_REQUESTS, TOTAL_TOKENS)


class Load:
    """What a dispatcher sees of a rank, or of a group: the sum of its ranks."""

    def __init__(self, whole: "Load | None" = None) -> None:
        self.num_requests = 0  # running and waiting
        self.num_tokens = 0  # in the KV cache, and of the waiting requests' prompts
        self._whole = whole

    def set(self, num_requests: int, num_tokens: int) -> None:
        if self._whole is not None:
            self._whole.num_requests += num_requests - self.num_requests
            self._whole.num_tokens += num_tokens - self.num_tokens
        self.num_requests = num_requests
        self.num_tokens = num_tokens


class Target(Protocol):
    @property
    def load(self) -> Load: ...


T = TypeVar("T", bound=Target)


class Dispatcher:
    """Remembers nothing but whose turn it is."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._turn = 0

    def choose(self, targets: Sequence[T]) -> T:
        """Among equals the first."""
        if self._method == TOTAL_REQUESTS:
            return min(targets, key=lambda target: target.load.num_requests)
        if self._method == TOTAL_TOKENS:
            return min(targets, key=lambda target: target.load.num_tokens)
        chosen = targets[self._turn % len(targets)]
        self._turn += 1
        return chosen

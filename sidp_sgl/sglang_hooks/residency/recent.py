"""How many tokens the radix cache may hold that were used of late. Pure."""

from collections import deque


class RecentTokens:
    """Tokens that were used in the last `seconds`; those used twice count twice, so that what else
    is in a least-recently-used cache is older than that."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._uses: deque[tuple[float, int]] = deque()
        self._total = 0

    def use(self, now: float, num_tokens: int) -> None:
        self._uses.append((now, num_tokens))
        self._total += num_tokens

    def total(self, now: float) -> int:
        while self._uses and self._uses[0][0] < now - self._seconds:
            self._total -= self._uses.popleft()[1]
        return self._total

"""Prompts as keys that sort by shared prefix, and a rank's recent ones."""

from collections import deque
from collections.abc import Sequence

import numpy as np
from sortedcontainers import SortedList

KEY_TOKENS = 4096  # longer prompts that agree so far count as the same
_BYTES = 4  # of a token in a key


def prompt_key(token_ids: Sequence[int]) -> bytes:
    """The prompt's first tokens, big-endian: keys sort as their tokens do."""
    return np.asarray(token_ids[:KEY_TOKENS]).astype(">u4").tobytes()


def shared_tokens(one: bytes, other: bytes) -> int:
    """Length in tokens of the prefix that two keys share."""
    length = min(len(one), len(other)) // _BYTES
    differ = np.frombuffer(one, ">u4", length) != np.frombuffer(other, ">u4", length)
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length


class RecentPrompts:
    """What a rank's prefix cache may still hold: its latest prompts, `capacity_tokens` in all."""

    def __init__(self) -> None:
        self.capacity_tokens = 0
        self._sorted: SortedList = SortedList()
        self._in_order: deque[bytes] = deque()
        self._tokens = 0

    def add(self, key: bytes) -> None:
        self._sorted.add(key)
        self._in_order.append(key)
        self._tokens += len(key) // _BYTES
        while len(self._in_order) > 1 and self._tokens > self.capacity_tokens:
            oldest = self._in_order.popleft()
            self._sorted.remove(oldest)
            self._tokens -= len(oldest) // _BYTES

    def shared_tokens(self, key: bytes) -> int:
        """The longest prefix that `key` shares with any of them: with a neighbour in the order."""
        index = self._sorted.bisect_left(key)
        neighbours = self._sorted[max(0, index - 1) : index + 1]
        return max((shared_tokens(key, neighbour) for neighbour in neighbours), default=0)

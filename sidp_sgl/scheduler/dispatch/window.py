"""The requests that no rank has yet, in an order that serves the prefix caches and the job's tail.

Pure. Long outputs come first, those of about the same length sorted by prompt.
Each rank moves a cursor of its own through this order, so that prompts that share a prefix follow
each other on one rank; a rank that comes to another's cursor goes on in the middle of what is
left.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sortedcontainers import SortedList

from sidp_sgl.scheduler.dispatch.prompts import shared_tokens

_PATIENCE = 4  # a request waits for at most this many times the requests that it found
_PATIENCE_MINIMUM = 1000


@dataclass(frozen=True, slots=True)
class Queued:
    """`prompt`: its key; `output_tokens`: at most. `payload`: what the caller wants back."""

    number: int  # of arrival; increases
    prompt: bytes
    prompt_tokens: int
    output_tokens: int
    payload: Any


class Window:
    """`pick` takes a request out; every one is taken once."""

    def __init__(self) -> None:
        self._by_number: OrderedDict[int, tuple[Queued, int]] = OrderedDict()  # with its deadline
        self._buckets: dict[int, SortedList] = {}  # by size of the output: (prompt, number)
        self._picks = 0

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Queued]:
        """In order of arrival."""
        return (queued for queued, _ in self._by_number.values())

    def add(self, queued: Queued) -> None:
        patience = max(_PATIENCE_MINIMUM, _PATIENCE * len(self))
        self._by_number[queued.number] = (queued, self._picks + patience)
        bucket = self._buckets.setdefault(_bucket(queued), SortedList())
        bucket.add((queued.prompt, queued.number))

    def remove(self, number: int) -> Queued:
        """Take out one that was added."""
        queued, _ = self._by_number.pop(number)
        key = _bucket(queued)
        self._buckets[key].remove((queued.prompt, number))
        if not self._buckets[key]:
            del self._buckets[key]
        self._picks += 1
        return queued

    def oldest(self) -> Queued:
        return next(iter(self._by_number.values()))[0]

    def pick(self, cursor: bytes | None, others: Sequence[bytes]) -> Queued:
        """The next request for a rank whose latest prompt is `cursor`; `others`: other ranks'."""
        return self.remove(self._choose(cursor, others))

    def _choose(self, cursor: bytes | None, others: Sequence[bytes]) -> int:
        oldest, deadline = next(iter(self._by_number.values()))
        if deadline <= self._picks:
            return oldest.number
        bucket = self._buckets[max(self._buckets)]
        if cursor is not None:
            index = bucket.bisect_left((cursor,))
            near = [bucket[i] for i in (index, index - 1) if 0 <= i < len(bucket)]
            shared = [shared_tokens(cursor, prompt) for prompt, _ in near]
            best = shared.index(max(shared))
            prompt, number = near[best]
            if all(shared_tokens(other, prompt) <= shared[best] for other in others):
                return number
        return _in_largest_gap(bucket, others)


def _in_largest_gap(bucket: SortedList, cursors: Sequence[bytes]) -> int:
    """The first request where no rank's cursor is before it; else that in the middle of the
    longest way from one rank's cursor to the next one's."""
    cuts = sorted({bucket.bisect_left((cursor,)) for cursor in cursors} | {0, len(bucket)})
    if len(cuts) == 2 and not cursors:
        return bucket[0][1]
    begin, end = max(pairwise(cuts), key=lambda gap: gap[1] - gap[0])
    is_free = begin == 0 and not any(bucket.bisect_left((cursor,)) == 0 for cursor in cursors)
    return bucket[begin if is_free else (begin + end) // 2][1]


def _bucket(queued: Queued) -> int:
    """Outputs up to 1, 3, 7, 15, … tokens."""
    return queued.output_tokens.bit_length()

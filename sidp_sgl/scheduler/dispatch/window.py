"""The requests that no rank has yet, in an order that serves prefix caches and, in a job, its tail.

Pure. Requests wait in generations. These are served in the order in which they came; within one,
prompts that share a prefix follow each other, in a job behind those with longer outputs. How long a
generation takes newcomers is what bounds how far a request can be overtaken.
Each rank moves a cursor of its own through this order, so that prompts that share a prefix follow
each other on one rank; a rank that comes to another's cursor goes on in the middle of what is
left.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sortedcontainers import SortedList

from sidp_sgl.scheduler.dispatch.prompts import shared_tokens

_JOB_PATIENCE = 4  # times the requests that wait or run
_SERVER_SHARE = 2  # of the requests that run: one half


@dataclass(frozen=True, slots=True)
class Queued:
    """`prompt`: its key; `output_tokens`: at most. `payload`: what the caller wants back."""

    number: int  # of arrival; increases
    prompt: bytes
    prompt_tokens: int
    output_tokens: int
    payload: Any


@dataclass(slots=True)
class _Generation:
    joined: int = 0
    picked: int = 0
    waiting: int = 0
    buckets: dict[int, SortedList] = field(default_factory=dict)  # (prompt, number)


class Window:
    """`pick` takes a request out; every one is taken once.

    In a job a generation takes newcomers until four times as many of it have been picked as wait
    or run: whatever comes before the first pick is sorted as a whole. On a server it takes half as
    many requests as run, so that nobody is overtaken for longer than half a typical request.
    """

    def __init__(self, is_job: bool) -> None:
        self.running = 0  # requests that all ranks run, as of now
        self._is_job = is_job
        self._waiting: OrderedDict[int, tuple[Queued, _Generation]] = OrderedDict()
        self._generations: deque[_Generation] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Queued]:
        """In order of arrival."""
        return (queued for queued, _ in self._waiting.values())

    def add(self, queued: Queued) -> None:
        if not self._generations or not self._takes_more(self._generations[-1]):
            self._generations.append(_Generation())
        generation = self._generations[-1]
        generation.joined += 1
        self._insert(queued, generation)

    def add_again(self, queued: Queued) -> None:
        """One that was taken out before: as the oldest, among those whose turn it is."""
        if not self._generations:
            self._generations.append(_Generation())
        self._insert(queued, self._generations[0])
        self._waiting.move_to_end(queued.number, last=False)

    def _takes_more(self, generation: _Generation) -> bool:
        if self._is_job:
            return generation.picked < _JOB_PATIENCE * max(self.running, generation.waiting)
        return generation.joined < max(1, self.running // _SERVER_SHARE)

    def _insert(self, queued: Queued, generation: _Generation) -> None:
        self._waiting[queued.number] = (queued, generation)
        bucket = generation.buckets.setdefault(self._bucket(queued), SortedList())
        bucket.add((queued.prompt, queued.number))
        generation.waiting += 1

    def remove(self, number: int) -> Queued:
        """Take out one that was added."""
        queued, generation = self._waiting.pop(number)
        key = self._bucket(queued)
        generation.buckets[key].remove((queued.prompt, number))
        if not generation.buckets[key]:
            del generation.buckets[key]
        generation.waiting -= 1
        while self._generations and not self._generations[0].waiting:
            self._generations.popleft()
        return queued

    def oldest(self) -> Queued:
        return next(iter(self._waiting.values()))[0]

    def pick(self, cursor: bytes | None, others: Sequence[bytes]) -> Queued:
        """The next request for a rank whose latest prompt is `cursor`; `others`: other ranks'."""
        generation = self._generations[0]
        generation.picked += 1
        bucket = generation.buckets[max(generation.buckets)]
        return self.remove(_choose(bucket, cursor, others))

    def _bucket(self, queued: Queued) -> int:
        """In a job by the size of the output: up to 1, 3, 7, 15, … tokens."""
        return queued.output_tokens.bit_length() if self._is_job else 0


def _choose(bucket: SortedList, cursor: bytes | None, others: Sequence[bytes]) -> int:
    """The number of the request that shares most with the cursor, unless it shares more with
    another rank's."""
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

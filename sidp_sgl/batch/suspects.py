"""Which lines may have ended an engine, and how they run until it is known which one did.

Pure. What was in an engine when it ended is suspect. Few suspects run one by one; many run in
groups of a square root's size first, and one by one only those of a group that ends the engine
again, so that one line of 4,096 costs three ends of the engine and at most 64 lines run alone. The
one that ends the engine alone is to blame; all others are answered as always.

Lines are sent in the input's order, so suspects are what has no record between two lines.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import isqrt

ALONE = 64  # from so few suspects on each runs alone


@dataclass(eq=False)
class _Range:
    """The lines without a record from `first` to `last`."""

    first: int
    last: int
    size: int  # how many of them run at a time, and nothing else beside them
    num_ends: int = 0  # of engines, which made them suspect and which no line is to blame for yet

    def __contains__(self, line: int) -> bool:
        return self.first <= line <= self.last


class Suspects:
    """`ranges`: what `ranges` gave in an earlier run of the job."""

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        self._ranges = [_Range(*values) for values in ranges]  # a part before what it is part of
        self.num_unexplained = 0  # ends of engines that no line is to blame for

    @property
    def ranges(self) -> list[tuple[int, int, int]]:
        """For the next run of the job."""
        return [(suspects.first, suspects.last, suspects.size) for suspects in self._ranges]

    def may_join(self, line: int, in_flight: Collection[int]) -> bool:
        """Whether `line`, the next one, may run beside those that are in the engine."""
        if not in_flight:
            return True
        suspects = self._range(line)
        if suspects is not self._range(next(iter(in_flight))):
            return False
        return suspects is None or len(in_flight) < suspects.size

    def runs_alone(self, line: int) -> bool:
        """Whether it is to blame if the engine ends now."""
        suspects = self._range(line)
        return suspects is not None and suspects.size == 1

    def engine_ended(self, in_flight: Sequence[int], counts: bool = True) -> int | None:
        """The line that is to blame; None where it is not known, or nothing was in flight.

        `in_flight`: what the engine had not answered, in order. `counts`: whether this end is one
        of `num_unexplained`.
        """
        self.num_unexplained += counts
        if not in_flight:
            return None
        if self.runs_alone(in_flight[0]):
            self._explain(in_flight[0], counts)
            return in_flight[0]
        number = len(in_flight)
        size = 1 if number <= ALONE else isqrt(number)
        before = [found for found in self._ranges if found.last >= in_flight[0]]
        self._ranges = [_Range(in_flight[0], in_flight[-1], size, int(counts)), *before]
        return None

    def _explain(self, line: int, counts: bool) -> None:
        """`line` is to blame for the ends that have made it suspect, and for this one."""
        self.num_unexplained -= counts
        for suspects in self._ranges:
            if line in suspects:
                self.num_unexplained -= suspects.num_ends
                suspects.num_ends = 0

    def _range(self, line: int) -> _Range | None:
        return next((suspects for suspects in self._ranges if line in suspects), None)

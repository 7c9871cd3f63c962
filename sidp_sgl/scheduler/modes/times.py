"""What a rank knows about the time of its decode steps, and the threshold that follows.

Pure: measured at start, corrected by every step. All times in seconds.
"""

from bisect import bisect_left
from collections import deque
from itertools import accumulate
from math import sqrt
from statistics import median

from sidp_sgl.scheduler.modes.policy import CAS, WAS
from sidp_sgl.scheduler.modes.retries import OTHER, Retries

_WEIGHT = 0.1  # of a new observation of the fetches in their moving average
_RECENT_STEPS = 15  # of a mode, whose median counts: a machine's other work disturbs single steps
_BOUND_SHARE = 0.1  # a WaS step that stalls for more of its time is bound by its fetches
_OUTLIER = 10.0  # times the estimate of a step: more than that is a disturbance, not its time
_NEAR = 0.05  # WaS may take longer than CaS by this part: it asks nothing of the owners


class StepTimes:
    """`fetch_seconds`: all fetches of a step; `compute_seconds`: batch size → compute of a step.

    A CaS step takes its compute and an overhead, a WaS step its compute and another overhead, or
    its fetches where these take longer. Part of an overhead is the same at every batch size
    (scheduling, wake-ups), part goes with the compute (copies beside it, a busy machine), and steps
    of one size don't tell which: between the two, it is taken to go with the compute's square root.
    Raises ValueError where `compute_seconds` is empty, or has a time that is not above 0.
    """

    def __init__(self, fetch_seconds: float, compute_seconds: dict[int, float]) -> None:
        if not compute_seconds or min(compute_seconds.values()) <= 0.0:
            raise ValueError("step times need one measured batch size at least, and times above 0")
        self.fetch_seconds = fetch_seconds
        self._sizes = sorted(compute_seconds)
        # A larger batch that measured faster is noise, and would make the threshold ambiguous.
        self._seconds = list(accumulate((compute_seconds[size] for size in self._sizes), max))
        # By mode, from its first observation on: overhead over the square root of the compute.
        self._overheads: dict[str, deque[float]] = {}
        self._retries = Retries()

    def overhead_seconds(self, mode: str, batch_size: int) -> float:
        """What a step takes beyond the measured compute, without stalls: scheduling, longer
        contexts, in CaS the way to the owners, in WaS what copies take from the compute beside
        them. Below 0 where it takes less. A mode that was not seen yet is like the other one."""
        return self._overhead(mode) * sqrt(self._measured(batch_size))

    def _overhead(self, mode: str) -> float:
        seen = self._overheads.get(mode) or self._overheads.get(OTHER[mode])
        return median(seen) if seen else 0.0

    def observe(self, mode: str, batch_size: int, seconds: float, stall_seconds: float) -> None:
        """A decode step took `seconds` in all, `stall_seconds` of them waiting for fetches."""
        limit = self._limit(mode, batch_size)
        local = max(0.0, min(seconds - stall_seconds, limit))
        measured = self._measured(batch_size)
        recent = self._overheads.setdefault(mode, deque(maxlen=_RECENT_STEPS))
        recent.append((local - measured) / sqrt(measured))
        if mode == WAS:
            self._observe_fetches(min(seconds, limit), stall_seconds > _BOUND_SHARE * seconds)
        if self._retries.is_due(mode, batch_size) and OTHER[mode] in self._overheads:
            # As if it had never cost anything: what slows one mode need not slow the other.
            least = min(0.0, self._overhead(mode))
            self._overheads[OTHER[mode]] = deque([least], maxlen=_RECENT_STEPS)

    def _observe_fetches(self, seconds: float, is_bound: bool) -> None:
        """A WaS step that waits takes as long as its fetches; one that does not, longer."""
        if is_bound or seconds < self.fetch_seconds:
            self.fetch_seconds += _WEIGHT * (seconds - self.fetch_seconds)

    def _limit(self, mode: str, batch_size: int) -> float:
        """The longest observation that is believed: stopped processes must not set the times."""
        estimate = self.step_seconds(mode, batch_size)
        if mode == WAS or mode not in self._overheads:
            estimate = max(estimate, self.fetch_seconds)
        # An estimate of zero must be able to recover.
        return _OUTLIER * estimate if estimate > 0.0 else float("inf")

    def step_seconds(self, mode: str, batch_size: int) -> float:
        """Estimate of a decode step that does not stall for fetches."""
        return max(0.0, self._expected(mode, batch_size))

    def _expected(self, mode: str, batch_size: int) -> float:
        return self._measured(batch_size) + self.overhead_seconds(mode, batch_size)

    def _measured(self, batch_size: int) -> float:
        """Compute time as measured at start, on the line through the two nearest batch sizes."""
        sizes, seconds = self._sizes, self._seconds
        if len(sizes) == 1:
            return seconds[0]
        right = min(max(bisect_left(sizes, batch_size), 1), len(sizes) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (sizes[right] - sizes[left])
        # Below the first one the line may fall to 0; compute is more than its part of the rows.
        least = seconds[0] * min(1.0, batch_size / sizes[0])
        return max(least, seconds[left] + slope * (batch_size - sizes[left]))

    def threshold(self, max_batch: int) -> int:
        """The smallest batch size from which WaS is as fast as CaS: the fetches take no longer
        than a CaS step, and what runs beside them hardly longer. `max_batch` + 1 where no batch
        is that large."""
        return 1 + bisect_left(range(1, max_batch + 1), True, key=self._streams)

    def _streams(self, batch_size: int) -> bool:
        """Once true, it stays so for all larger batches: compute never falls with the batch, and
        overheads grow more slowly than the compute."""
        was, cas = (self._expected(mode, batch_size) for mode in (WAS, CAS))
        return streams(self.fetch_seconds, was, cas)


def streams(fetch_seconds: float, was_seconds: float, cas_seconds: float) -> bool:
    """Whether WaS is as fast as CaS: by a step's fetches, and a step of either without stalls."""
    return fetch_seconds <= cas_seconds and was_seconds <= (1.0 + _NEAR) * cas_seconds

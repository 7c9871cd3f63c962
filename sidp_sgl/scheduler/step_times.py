"""What a rank knows about the time of its decode steps, and the threshold that follows.

Room: scheduler. Pure: measured at start, corrected by every step. All times in seconds.
"""

from bisect import bisect_left
from collections import deque
from itertools import accumulate
from statistics import median

from sidp_sgl.scheduler.mode_policy import CAS, WAS
from sidp_sgl.scheduler.retries import OTHER, Retries

_WEIGHT = 0.1  # of a new observation of the fetches in their moving average
_RECENT_STEPS = 15  # of a mode, whose median counts: a machine's other work disturbs single steps
_BOUND_SHARE = 0.1  # a WaS step that stalls for more of its time is bound by its fetches
_OUTLIER = 10.0  # times the estimate of a step: more than that is a disturbance, not its time
_NEAR = 0.05  # WaS may take longer than CaS by this part: it asks nothing of the owners


class StepTimes:
    """`fetch_seconds`: all fetches of a step; `compute_seconds`: batch size → compute of a step.

    A CaS step takes its compute times a slowdown, a WaS step its compute times another slowdown, or
    its fetches where these take longer. Raises ValueError where `compute_seconds` is empty, or has
    a time that is not above 0.
    """

    def __init__(self, fetch_seconds: float, compute_seconds: dict[int, float]) -> None:
        if not compute_seconds or min(compute_seconds.values()) <= 0.0:
            raise ValueError("step times need one measured batch size at least, and times above 0")
        self.fetch_seconds = fetch_seconds
        self._sizes = sorted(compute_seconds)
        # A larger batch that measured faster is noise, and would make the threshold ambiguous.
        self._seconds = list(accumulate((compute_seconds[size] for size in self._sizes), max))
        self._slowdowns: dict[str, deque[float]] = {}  # by mode, from its first observation on
        self._retries = Retries()

    def slowdown(self, mode: str) -> float:
        """What a step takes without its stalls, over the measured compute: scheduling, longer
        contexts, other work of the machine, in CaS the way to the owners, in WaS what copies take
        from the compute beside them. A mode that was not seen yet is like the other one."""
        seen = self._slowdowns.get(mode) or self._slowdowns.get(OTHER[mode])
        return median(seen) if seen else 1.0

    def observe(self, mode: str, batch_size: int, seconds: float, stall_seconds: float) -> None:
        """A decode step took `seconds` in all, `stall_seconds` of them waiting for fetches."""
        limit = self._limit(mode, batch_size)
        local = max(0.0, min(seconds - stall_seconds, limit))
        recent = self._slowdowns.setdefault(mode, deque(maxlen=_RECENT_STEPS))
        recent.append(local / self._measured(batch_size))
        if mode == WAS:
            self._observe_fetches(min(seconds, limit), stall_seconds > _BOUND_SHARE * seconds)
        if self._retries.is_due(mode) and OTHER[mode] in self._slowdowns:
            # As if it had never cost anything: what slows one mode need not slow the other.
            least = min(1.0, self.slowdown(mode))
            self._slowdowns[OTHER[mode]] = deque([least], maxlen=_RECENT_STEPS)

    def _observe_fetches(self, seconds: float, is_bound: bool) -> None:
        """A WaS step that waits takes as long as its fetches; one that does not, longer."""
        if is_bound or seconds < self.fetch_seconds:
            self.fetch_seconds += _WEIGHT * (seconds - self.fetch_seconds)

    def _limit(self, mode: str, batch_size: int) -> float:
        """The longest observation that is believed: stopped processes must not set the times."""
        estimate = self.step_seconds(mode, batch_size)
        if mode == WAS or mode not in self._slowdowns:
            estimate = max(estimate, self.fetch_seconds)
        # An estimate of zero must be able to recover.
        return _OUTLIER * estimate if estimate > 0.0 else float("inf")

    def step_seconds(self, mode: str, batch_size: int) -> float:
        """Estimate of a decode step that does not stall for fetches."""
        return self._measured(batch_size) * self.slowdown(mode)

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
        """Once true, it stays so for all larger batches: compute never falls with the batch."""
        was, cas = (self.step_seconds(mode, batch_size) for mode in (WAS, CAS))
        return streams(self.fetch_seconds, was, cas)


def streams(fetch_seconds: float, was_seconds: float, cas_seconds: float) -> bool:
    """Whether WaS is as fast as CaS: by a step's fetches, and a step of either without stalls."""
    return fetch_seconds <= cas_seconds and was_seconds <= (1.0 + _NEAR) * cas_seconds

"""What a rank knows about the time of its decode steps, and the threshold that follows.

Room: scheduler. Pure: measured at start, corrected by every step. All times in seconds.
"""

from bisect import bisect_left
from itertools import accumulate

from sidp_sgl.scheduler.mode_policy import CAS

_WEIGHT = 0.1  # of a new observation in a moving average
_BOUND_SHARE = 0.1  # a WaS step that stalls for more of its time is bound by its fetches
_OUTLIER = 10.0  # times the estimate of a step: more than that is a disturbance, not its time


class StepTimes:
    """`fetch_seconds`: all fetches of a step; `compute_seconds`: batch size → compute of a step.

    Raises ValueError where `compute_seconds` is empty.
    """

    def __init__(self, fetch_seconds: float, compute_seconds: dict[int, float]) -> None:
        if not compute_seconds:
            raise ValueError("step times need one measured batch size at least")
        self.fetch_seconds = fetch_seconds
        self._sizes = sorted(compute_seconds)
        # A larger batch that measured faster is noise, and would make the threshold ambiguous.
        self._seconds = list(accumulate((compute_seconds[size] for size in self._sizes), max))
        self._overhead: float | None = None  # None until the first observation
        self._remote: float | None = None

    @property
    def overhead_seconds(self) -> float:
        """What a step takes beyond its measured compute; below 0 where it takes less."""
        return self._overhead or 0.0

    @property
    def remote_seconds(self) -> float:
        """What a CaS step waits for remote units; 0.0 before the first one."""
        return self._remote or 0.0

    def observe(
        self,
        mode: str,
        batch_size: int,
        seconds: float,
        stall_seconds: float,
        wait_seconds: float,
    ) -> None:
        """A decode step took `seconds` in all: of these it stalled for fetches, and waited for
        remote units."""
        limit = self._limit(mode, batch_size)
        local = max(0.0, min(seconds - stall_seconds - wait_seconds, limit))
        self._overhead = _averaged(self._overhead, local - self._measured(batch_size))
        if mode == CAS:
            self._remote = _averaged(self._remote, min(wait_seconds, limit))
        elif stall_seconds > _BOUND_SHARE * seconds:
            self.fetch_seconds = _averaged(self.fetch_seconds, min(seconds, limit))

    def _limit(self, mode: str, batch_size: int) -> float:
        """The longest observation that is believed: stopped processes must not set the times."""
        estimate = self.step_seconds(batch_size)
        if mode == CAS and self._remote is not None:
            estimate += self._remote
        else:
            estimate = max(estimate, self.fetch_seconds)
        # An estimate of zero must be able to recover.
        return _OUTLIER * estimate if estimate > 0 else float("inf")

    def step_seconds(self, batch_size: int) -> float:
        """Estimate of a decode step with all weights local."""
        return max(0.0, self._measured(batch_size) + self.overhead_seconds)

    def _measured(self, batch_size: int) -> float:
        """Compute time as measured at start, on the line through the two nearest batch sizes."""
        sizes, seconds = self._sizes, self._seconds
        if len(sizes) == 1:
            return seconds[0]
        right = min(max(bisect_left(sizes, batch_size), 1), len(sizes) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (sizes[right] - sizes[left])
        return max(0.0, seconds[left] + slope * (batch_size - sizes[left]))

    def threshold(self, max_batch: int) -> int:
        """The smallest batch size whose CaS step would take as long as the fetches of a WaS step.

        From there WaS, which takes the longer of compute and fetches, is as fast; `max_batch` + 1
        where no batch is that large.
        """
        remote = self.remote_seconds
        sizes = range(1, max_batch + 1)
        return 1 + bisect_left(
            sizes, self.fetch_seconds, key=lambda size: self.step_seconds(size) + remote
        )


def _averaged(average: float | None, seconds: float) -> float:
    return seconds if average is None else average + _WEIGHT * (seconds - average)

"""How much of its recent time an owner spent serving others, and when that is too much.

Pure but for a lock: time comes in as an argument (seconds, monotonic).
"""

import threading
from collections import deque

BUSY = "busy"
SERVICE_LIMIT = 0.5  # of its time, that an owner with a batch of its own serves others


class ServiceShare:
    """Busy time within the last `window_seconds`. One thread adds, any thread asks.

    Both keep the same sum in step with the same intervals, hence the lock; it is held for a
    microsecond.
    """

    def __init__(self, window_seconds: float = 1.0) -> None:
        self._window = window_seconds
        self._intervals: deque[tuple[float, float]] = deque()
        self._busy = 0.0  # seconds, sum over the intervals
        self._latest = float("-inf")  # end of the last interval
        self._lock = threading.Lock()

    def add(self, start: float, end: float) -> None:
        """The owner served others from `start` to `end`, after all intervals before."""
        with self._lock:
            self._intervals.append((start, end))
            self._busy += end - start
            self._latest = end
            self._forget(end - self._window)

    def share(self, now: float) -> float:
        """Between 0 and 1, over the window that ends at `now`."""
        with self._lock:
            # An interval may have been added since the caller looked at the clock.
            begin = max(now, self._latest) - self._window
            self._forget(begin)
            if not self._intervals:
                return 0.0
            outside = max(0.0, begin - self._intervals[0][0])
            return min(1.0, max(0.0, (self._busy - outside) / self._window))

    def _forget(self, begin: float) -> None:
        while self._intervals and self._intervals[0][1] <= begin:
            start, end = self._intervals.popleft()
            self._busy -= end - start
        if not self._intervals:
            self._busy = 0.0  # no rounding errors are carried on


def decline_reason(share: float, own_batch_size: int) -> str | None:
    """Why an owner that spends `share` of its time serving refuses to serve more; None: it serves.

    An owner without a running batch of its own always serves: nothing of its own can starve.
    """
    return None if own_batch_size == 0 or share < SERVICE_LIMIT else BUSY

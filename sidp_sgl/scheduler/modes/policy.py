"""Which mode a decode step runs in: stream the weights (WaS) or send the rows (CaS).

Pure: a state machine over batch sizes and thresholds, stepped once per decode.
"""

import math
from collections import Counter

WAS = "was"
CAS = "cas"
LOCAL = "local"  # all weights are here for now; nothing to decide
AUTO = "auto"
MARGIN = 0.1  # part of the threshold by which a batch must fall below it before CaS is wanted
DWELL_STEPS = 4  # consecutive steps that must want the other mode before a switch

REACHED = "batch reached threshold"
FELL_BELOW = "batch fell below threshold"
NO_THRESHOLD = "no threshold"


class ModePolicy:
    """`configured` is "was", "cas" (both constant) or "auto"; raises ValueError otherwise.

    `switches` counts changes of `mode` after the first decision, `reasons` the same by reason.
    """

    def __init__(self, configured: str) -> None:
        if configured not in (AUTO, WAS, CAS):
            raise ValueError(f"no such mode: {configured}")
        self.mode = CAS if configured == CAS else WAS
        self.switches = 0
        self.reasons: Counter[str] = Counter()
        self._is_constant = configured != AUTO
        self._is_first = True
        self._contrary_steps = 0  # consecutive steps so far that want the other mode

    def decide(self, batch_size: int, threshold: int | None) -> str:
        """The mode of the next decode step.

        `threshold`: the batch size from which WaS is as fast as CaS; None where unknown.
        """
        if self._is_constant:
            return self.mode
        wanted = _wanted(batch_size, threshold) or self.mode
        self._contrary_steps = self._contrary_steps + 1 if wanted != self.mode else 0
        if self._is_first:
            self.mode = wanted
            self._contrary_steps = 0
        elif self._contrary_steps == DWELL_STEPS:
            self._switch(wanted, threshold)
        self._is_first = False
        return self.mode

    def sends(self, rows: int, threshold: int | None) -> bool:
        """Whether a single step of so many rows is one for CaS, whatever came before it."""
        if self._is_constant:
            return self.mode == CAS
        return threshold is not None and rows < threshold

    def _switch(self, wanted: str, threshold: int | None) -> None:
        self.mode = wanted
        self._contrary_steps = 0
        self.switches += 1
        to_was = NO_THRESHOLD if threshold is None else REACHED
        self.reasons[to_was if wanted == WAS else FELL_BELOW] += 1


def _wanted(batch_size: int, threshold: int | None) -> str | None:
    """None in the band below the threshold, where the mode stays as it is."""
    if threshold is None or threshold <= 1 or batch_size >= threshold:
        return WAS
    # A small threshold has no band: one row less must be able to make the difference.
    has_band = threshold * MARGIN > 1
    return CAS if not has_band or batch_size < math.ceil(threshold * (1 - MARGIN)) else None

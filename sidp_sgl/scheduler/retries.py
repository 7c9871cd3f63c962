"""When the mode that is not in use is tried again: what it takes is seen in its own steps only.

Room: scheduler. Pure.
"""

from sidp_sgl.scheduler.mode_policy import CAS, WAS

FIRST_WAIT = 32  # steps in one mode before the other is tried again; doubled by every retry
LONGEST_WAIT = 3200
PROVEN_STEPS = 32  # in a row: a mode that stays that long is worth its retries
OTHER = {WAS: CAS, CAS: WAS}


class Retries:
    """Told of every step's mode. A rank that left a mode because it was slow for a while tries it
    again, but ever more rarely where it does not stay."""

    def __init__(self) -> None:
        self._waits = dict.fromkeys(OTHER, FIRST_WAIT)  # by the mode that is tried again
        self._mode: str | None = None
        self._steps = 0  # in a row in `_mode`
        self._waited = 0  # of these, since the other mode was last to be tried

    def is_due(self, mode: str) -> bool:
        """A step ran in `mode`: whether the other one is to be tried again now."""
        if mode != self._mode:
            self._mode, self._steps, self._waited = mode, 0, 0
        self._steps += 1
        self._waited += 1
        if self._steps == PROVEN_STEPS:
            self._waits[mode] = FIRST_WAIT
        other = OTHER[mode]
        if self._waited < self._waits[other]:
            return False
        self._waited = 0
        self._waits[other] = min(2 * self._waits[other], LONGEST_WAIT)
        return True

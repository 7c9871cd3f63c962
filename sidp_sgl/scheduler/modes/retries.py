"""When the mode that is not in use is tried again: what it takes is seen in its own steps only."""

from sidp_sgl.scheduler.modes.policy import CAS, WAS

FIRST_WAIT = 32  # steps in one mode before the other is tried again; doubled by every retry
LONGEST_WAIT = 3200
PROVEN_STEPS = 32  # in a row: a mode that stays that long is worth its retries
FAR = 2.0  # times a batch size: what a mode costs there says little about what it costs here
OTHER = {WAS: CAS, CAS: WAS}


class Retries:
    """Told of every step's mode and batch size. A rank that left a mode because it was slow for a
    while tries it again, but ever more rarely where it does not stay; less rarely as its batch
    grows or shrinks, as in the tail of a job, where sending becomes cheap for all ranks at once."""

    def __init__(self) -> None:
        self._waits = dict.fromkeys(OTHER, FIRST_WAIT)  # by the mode that is tried again
        self._tried_at: dict[str, int] = {}  # batch size at which each mode ran, or was due
        self._mode: str | None = None
        self._steps = 0  # in a row in `_mode`
        self._waited = 0  # of these, since the other mode was last to be tried

    def is_due(self, mode: str, batch_size: int) -> bool:
        """A step ran in `mode`: whether the other one is to be tried again now."""
        if mode != self._mode:
            self._mode, self._steps, self._waited = mode, 0, 0
        self._steps += 1
        self._waited += 1
        if self._steps == PROVEN_STEPS:
            self._waits[mode] = FIRST_WAIT
        other = OTHER[mode]
        self._tried_at[mode] = batch_size
        tried_at = self._tried_at.setdefault(other, batch_size)
        if not tried_at / FAR < batch_size < tried_at * FAR:
            self._tried_at[other] = batch_size
            self._waits[other] = FIRST_WAIT
        if self._waited < self._waits[other]:
            return False
        self._waited = 0
        self._waits[other] = min(2 * self._waits[other], LONGEST_WAIT)
        return True

"""Which mode a rank's next step runs in: policy, estimates and negotiation put together.

Between steps only; a step that has begun in CaS may still fall back by itself.
"""

from sidp_sgl.scheduler.modes.lease_client import LeaseClient
from sidp_sgl.scheduler.modes.policy import CAS, LOCAL, WAS, ModePolicy
from sidp_sgl.scheduler.modes.times import StepTimes

_ROUND_ROWS = 8  # leases are asked for in multiples, so that a batch that grows a little fits
_RECALCULATE_STEPS = 8
_PATIENCE_SHARE = 0.25  # of a WaS step: what an answer may take
_PATIENCE_SECONDS = (2e-3, 50e-3)


class StepModes:
    """`threshold`: batch size from which WaS is used, or None where it follows `times`.

    `max_rows`: rows of a CaS step at most. A prefill of so many tokens as a decode step has
    requests does the same to pooled weights: one threshold is for both.
    """

    def __init__(
        self,
        policy: ModePolicy,
        leases: LeaseClient,
        threshold: int | None = None,
        max_rows: int = 0,
    ) -> None:
        self.policy = policy
        self.leases = leases
        self.times: StepTimes | None = None
        self.steps = {WAS: 0, CAS: 0, LOCAL: 0}
        self.max_rows = max_rows
        self._given_threshold = threshold
        self._threshold: int | None = threshold
        self._decided = 0
        self._learns = True
        self._is_local = False  # the latest decode step

    @property
    def mode(self) -> str:
        """Of the latest decode step."""
        return LOCAL if self._is_local else self.policy.mode

    @property
    def threshold(self) -> int | None:
        """Batch size from which WaS is used; None before it is known."""
        return self._threshold

    def set_threshold(self, threshold: int | None) -> None:
        """From the next step on; None: as `times` have it. While a threshold is set, steps teach
        nothing: what `auto` knows afterwards is of steps that it chose itself."""
        self._given_threshold = self._threshold = threshold
        self._decided = 0
        self._learns = threshold is None

    def observe(self, mode: str, batch_size: int, seconds: float, stall_seconds: float) -> None:
        """A decode step is over: as `StepTimes.observe`."""
        if self.times is not None and self._learns:
            self.times.observe(mode, batch_size, seconds, stall_seconds)

    def _patience(self, batch_size: int) -> float:
        """Seconds that owners have to answer."""
        low, high = _PATIENCE_SECONDS
        if self.times is None:
            return low
        step = max(self.times.fetch_seconds, self.times.step_seconds(WAS, batch_size))
        return min(max(_PATIENCE_SHARE * step, low), high)

    def begin_decode(self, batch_size: int, *, can_call: bool, is_local: bool = False) -> str:
        """The mode of a decode step; rows for a CaS step are leased. `is_local`: it needs no other
        rank."""
        self._is_local = is_local
        threshold = self._current_threshold()
        if is_local:
            return LOCAL
        if threshold is not None and threshold > self.max_rows:
            threshold = 2 * self.max_rows  # out of reach: no hysteresis below it
        wants_cas = self.policy.decide(batch_size, threshold) == CAS
        return self._leased(batch_size) if wants_cas and can_call else WAS

    def begin_prefill(self, num_tokens: int, *, can_call: bool, is_local: bool = False) -> str:
        """The mode of a prefill, which changes nothing for decode steps."""
        if is_local:
            return LOCAL
        wants_cas = self.policy.sends(num_tokens, self._current_threshold())
        return self._leased(num_tokens) if wants_cas and can_call else WAS

    def _current_threshold(self) -> int | None:
        """For a step that begins."""
        if self.times is not None and self._given_threshold is None:
            if self._decided % _RECALCULATE_STEPS == 0:
                self._threshold = self.times.threshold(self.max_rows)
            self._decided += 1
        return self._threshold

    def _leased(self, rows: int) -> str:
        """CaS where every owner leases as many rows."""
        if rows > self.max_rows or not self.leases.acquire(rows, self._patience(rows)):
            return WAS
        return CAS

    def end_decode(self, batch_size: int, mode: str, *, can_call: bool = True) -> None:
        """Count the step, and ask for the next one's leases while the scheduler does its part."""
        self.steps[mode] += 1
        if mode != LOCAL and self.policy.mode == CAS and can_call and batch_size <= self.max_rows:
            rows = -(-batch_size // _ROUND_ROWS) * _ROUND_ROWS
            self.leases.ask(min(rows, self.max_rows))
        else:
            self.leases.release()

    def end_prefill(self, mode: str) -> None:
        """Count the step; leases that it did not use stay."""
        self.steps[mode] += 1
        if mode == CAS:
            self.leases.release()

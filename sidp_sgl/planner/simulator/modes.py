"""The engine's own choice of mode, step by step: StepModes, ModePolicy, StepTimes, ServiceShare.

Room: planner; pure, but for what `scheduler` imports. Only the messages between ranks are replaced:
answers come at once and none is lost.
"""

from collections.abc import Mapping, Sequence
from typing import cast

from sidp_sgl.planner.group_times import CAS_ROWS
from sidp_sgl.planner.simulator.costs import StepCosts
from sidp_sgl.scheduler.control import SchedulerControl
from sidp_sgl.scheduler.mode_policy import CAS, WAS, ModePolicy
from sidp_sgl.scheduler.rank_control import SERVICE_LIMIT
from sidp_sgl.scheduler.service_share import ServiceShare, decline_reason
from sidp_sgl.scheduler.step_modes import StepModes


class Owner:
    """What the others ask a rank for, and load upon it."""

    def __init__(self) -> None:
        self.batch = 0  # its own
        self.sends_rows = 0  # in the CaS step under way; 0 in any other
        self.share = ServiceShare()


class _Answers:
    """In the place of SchedulerControl: all owners answer, by the engine's rule.

    Staging rows can't run out, for every rank may lease CAS_ROWS and asks for no more."""

    def __init__(self, others: Sequence[Owner]) -> None:
        self.now = 0.0
        self._others = others

    def leases(self, rows: int, seconds: float) -> Mapping[int, int] | None:
        for owner in self._others:
            if decline_reason(owner.share.share(self.now), owner.batch, SERVICE_LIMIT):
                return None
        return {}

    def ask(self, rows: int) -> None:
        pass

    def release(self) -> None:
        pass


class RankModes:
    """One rank's steps, chosen and timed; times in seconds."""

    def __init__(
        self, costs: StepCosts, mode: str, threshold: int | None, group: Sequence[Owner], rank: int
    ) -> None:
        self._costs = costs
        self._own = group[rank]
        self._others = [owner for n, owner in enumerate(group) if n != rank]
        self._answers = _Answers(self._others)
        self.policy = ModePolicy(mode)
        control = cast(SchedulerControl, self._answers)
        self._modes = StepModes(self.policy, control, CAS_ROWS, threshold)
        self._times = self._modes.times = costs.calibrated()
        self._begun: tuple[str, int, float] | None = None  # mode, batch, compute of the last step

    @property
    def threshold(self) -> int | None:
        return self._modes.threshold

    def prefill_seconds(self, now: float, compute: float) -> float:
        self._modes.end_prefill()
        self._begun = None
        return self._while_serving(now, self._costs.streamed(compute))

    def decode_seconds(self, now: float, batch: int, kv_tokens: int) -> tuple[str, float]:
        """Mode and duration of the decode step that begins `now`."""
        self._answers.now = now
        mode = WAS if self._modes.begin_decode(batch, can_call=True) is None else CAS
        compute = self._costs.decode(batch, kv_tokens)
        self._begun = mode, batch, compute
        if mode == WAS:
            return mode, self._while_serving(now, self._costs.streamed(compute))
        senders = [owner.sends_rows for owner in self._others if owner.sends_rows]
        all_rows = batch + sum(senders)
        self._own.sends_rows = batch
        self._load_owners(now, self._costs.service(all_rows) / (1 + len(senders)))
        return mode, self._costs.sent(batch, kv_tokens, all_rows)

    def _load_owners(self, now: float, seconds: float) -> None:
        """Each sender's part of what the other owners compute in this step; told when it begins,
        so that intervals come in order."""
        for owner in self._others:
            owner.share.add(now - seconds, now)

    def _while_serving(self, now: float, seconds: float) -> float:
        """A step of a rank that computes for others meanwhile; what it serves while it sends rows
        itself is in `StepCosts.sent`."""
        return seconds / (1.0 - min(self._own.share.share(now), SERVICE_LIMIT))

    def end_decode(self, seconds: float, goes_on: bool) -> None:
        """Like the engine, learns from a step that another one follows at once."""
        assert self._begun is not None
        mode, batch, compute = self._begun
        self._own.sends_rows = 0
        self._modes.end_decode(batch, mode)
        if goes_on:
            stall = self._costs.observed_stall(mode, seconds, compute)
            self._times.observe(mode, batch, seconds, stall)

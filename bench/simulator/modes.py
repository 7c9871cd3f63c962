"""The engine's own choice of mode, step by step: StepModes, ModePolicy, StepTimes, ServiceShare.
Only the messages between ranks are replaced.
"""

from typing import cast

from bench.simulator.costs import StepCosts
from sidp_sgl.scheduler.modes.lease_client import LeaseClient
from sidp_sgl.scheduler.modes.policy import WAS, ModePolicy
from sidp_sgl.scheduler.modes.service_share import SERVICE_LIMIT, ServiceShare, decline_reason
from sidp_sgl.scheduler.modes.step_modes import StepModes


class Service:
    """What the owners of one group compute for others: its extent, and when they decline."""

    def __init__(self, num_ranks: int) -> None:
        self.batches = [0] * num_ranks  # every rank's own
        self._rows = [0] * num_ranks  # that a rank sends in the CaS step under way
        # Every owner serves all but itself: two looks tell what one would per pair of ranks.
        self._all = ServiceShare()
        self._for_rank = [ServiceShare() for _ in range(num_ranks)]

    def send(self, rank: int, rows: int) -> tuple[int, int]:
        """`rank` begins a CaS step; returns all rows that meet the owners, and how many send."""
        self._rows[rank] = rows
        return sum(self._rows), sum(rows > 0 for rows in self._rows)

    def end_step(self, rank: int) -> None:
        self._rows[rank] = 0

    def load(self, rank: int, now: float, seconds: float) -> None:
        """Each other owner computes `seconds` for `rank`; told when the step begins, so that
        intervals come in order."""
        self._all.add(now - seconds, now)
        self._for_rank[rank].add(now - seconds, now)

    def share(self, owner: int, now: float) -> float:
        """Of the last second that `owner` served."""
        return max(0.0, self._all.share(now) - self._for_rank[owner].share(now))

    def declines(self, rank: int, now: float) -> bool:
        """Whether an owner declines to serve `rank`, by the engine's rule."""
        if self._all.share(now) < SERVICE_LIMIT:
            return False
        return any(
            decline_reason(self.share(owner, now), batch)
            for owner, batch in enumerate(self.batches)
            if owner != rank
        )


class _Answers:
    """In the place of LeaseClient: owners answer at once, and no message is lost.

    Staging rows can't run out, for every rank may lease its own and asks for no more."""

    def __init__(self, service: Service, rank: int) -> None:
        self.now = 0.0
        self._service = service
        self._rank = rank

    def acquire(self, rows: int, seconds: float) -> bool:
        return not self._service.declines(self._rank, self.now)

    def ask(self, rows: int) -> None:
        pass

    def release(self) -> None:
        pass


class RankModes:
    """One rank's steps, chosen and timed; times in seconds."""

    def __init__(
        self, costs: StepCosts, mode: str, threshold: int | None, service: Service, rank: int
    ) -> None:
        self._costs = costs
        self._service = service
        self._rank = rank
        self._answers = _Answers(service, rank)
        self.policy = ModePolicy(mode)
        leases = cast(LeaseClient, self._answers)
        self._modes = StepModes(self.policy, leases, threshold, costs.rows_per_rank)
        self._times = self._modes.times = costs.calibrated()
        self._begun: tuple[str, int, float] | None = None  # mode, batch, compute of the last step

    @property
    def threshold(self) -> int | None:
        return self._modes.threshold

    def prefill_seconds(self, now: float, compute: float) -> float:
        self._modes.end_prefill(WAS)
        return self._while_serving(now, self._costs.streamed(compute))

    def decode_seconds(self, now: float, batch: int, kv_tokens: int) -> tuple[str, float]:
        """Mode and duration of the decode step that begins `now`."""
        self._answers.now = now
        mode = self._modes.begin_decode(batch, can_call=True)
        compute = self._costs.decode(batch, kv_tokens)
        self._begun = mode, batch, compute
        if mode == WAS:
            return mode, self._while_serving(now, self._costs.streamed(compute))
        all_rows, senders = self._service.send(self._rank, batch)
        self._service.load(self._rank, now, self._costs.service(all_rows) / senders)
        return mode, self._costs.sent(batch, kv_tokens, all_rows)

    def _while_serving(self, now: float, seconds: float) -> float:
        """A step of a rank that computes for others meanwhile; what it serves while it sends rows
        itself is in `StepCosts.sent`."""
        return seconds / (1.0 - min(self._service.share(self._rank, now), SERVICE_LIMIT))

    def end_decode(self, seconds: float, goes_on: bool) -> None:
        """Like the engine, learns from a step that another one follows at once."""
        assert self._begun is not None
        mode, batch, compute = self._begun
        self._service.end_step(self._rank)
        self._modes.end_decode(batch, mode)
        if goes_on:
            stall = max(0.0, seconds - compute) if mode == WAS else 0.0
            self._times.observe(mode, batch, seconds, stall)

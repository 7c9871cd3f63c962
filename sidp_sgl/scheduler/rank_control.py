"""One rank's control plane put together: what it answers to others, and how it chooses its modes.

Room: scheduler.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sidp_sgl.config import OWN_DISPATCH, SidpConfig
from sidp_sgl.scheduler import disturbances
from sidp_sgl.scheduler.control import ControlThread, SchedulerControl
from sidp_sgl.scheduler.modes.leases import LeaseLedger
from sidp_sgl.scheduler.modes.policy import ModePolicy
from sidp_sgl.scheduler.modes.service_share import ServiceShare, decline_reason
from sidp_sgl.scheduler.modes.step_modes import StepModes

SERVICE_LIMIT = 0.5  # of its time, that an owner with a batch of its own serves others


class RankControl:
    """`owners`: owner of every layer. `capacity_rows` of staging are leased to others, `max_rows`
    is what this rank may ask for."""

    def __init__(
        self,
        config: SidpConfig,
        rank: int,
        num_ranks: int,
        owners: Sequence[int],
        engine: str,
        capacity_rows: int,
        max_rows: int,
    ) -> None:
        self._config = config
        self.own_batch_size = 0  # kept up to date by the scheduler
        self.share = ServiceShare()
        disturbed = disturbances.from_environment()
        self._disturbed = disturbances.DisturbedAnswers(disturbed, rank) if disturbed else None
        self.thread = ControlThread(
            rank, num_ranks, engine, LeaseLedger(capacity_rows), self._refusal
        )
        switch_every = disturbed.switch_every if disturbed else 0
        threshold = config.sidp_batch_threshold
        self.modes = StepModes(
            disturbances.ForcedSwitches(switch_every)
            if switch_every
            else ModePolicy(config.sidp_mode),
            SchedulerControl(
                rank, num_ranks, engine, sorted({owner for owner in owners if owner != rank})
            ),
            max_rows,
            None if isinstance(threshold, str) else threshold,
        )

    def start(self) -> None:
        self.thread.start()

    def _refusal(self) -> str | None:
        """Why this rank does not serve now; called by the control thread."""
        if self._disturbed is not None and (reason := self._disturbed.refusal()):
            return reason
        share = self.share.share(time.monotonic())
        return decline_reason(share, self.own_batch_size, SERVICE_LIMIT)

    def status(self) -> dict[str, Any]:
        """Mode and switches, for the `sidp` dictionary."""
        modes = self.modes
        return {
            "mode": modes.policy.mode,
            "batch_threshold": modes.threshold,
            "mode_switches": modes.policy.switches,
            "mode_switch_reasons": dict(modes.policy.reasons),
            "iterations": dict(modes.steps),
            "peers": [asdict(state) for state in self.thread.group.all()],
        }

    def dispatch_status(self) -> dict[str, Any]:
        """What the DP controller said last, the same on all ranks."""
        method = OWN_DISPATCH if self._config.own_dispatch else "sglang"
        return {"method": method, **asdict(self.thread.dispatch)}

    def cas_counters(self) -> dict[str, Any]:
        """Messages sent and answered; times in seconds."""
        control, negotiation = self.modes.control, self.modes.control.negotiation
        return {
            "requests": negotiation.requests,
            "granted": negotiation.granted,
            "declined": negotiation.declined,
            "silent": control.silences,
            "stale": negotiation.stale,
            "declines_given": dict(self.thread.declines),
            "sent_messages": control.sent + self.thread.sent,
            "dropped_messages": control.dropped,
            "malformed_messages": control.malformed + self.thread.inbox.malformed,
            "negotiation_seconds": control.wait_seconds,
            "service_share": self.share.share(time.monotonic()),
        }

"""One rank's control plane put together: leases for others, its own modes, the DP controller."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import structs

from sidp_sgl.config import OWN_DISPATCH, SidpConfig
from sidp_sgl.scheduler.dispatch.link import ControllerLink
from sidp_sgl.scheduler.messages import RankState
from sidp_sgl.scheduler.modes.lease_client import LeaseClient
from sidp_sgl.scheduler.modes.lease_server import LeaseServer
from sidp_sgl.scheduler.modes.leases import LeaseLedger
from sidp_sgl.scheduler.modes.policy import ModePolicy
from sidp_sgl.scheduler.modes.service_share import ServiceShare, decline_reason
from sidp_sgl.scheduler.modes.step_modes import StepModes


class ControlPlane:
    """`owners`: owner of every layer. `capacity_rows` of staging are leased to others, `max_rows`
    is what this rank may ask for."""

    def __init__(
        self,
        config: SidpConfig,
        rank: int,
        num_ranks: int,
        owners: Sequence[int],
        directory: Path,
        capacity_rows: int,
        max_rows: int,
    ) -> None:
        self.rank = rank
        self.own_batch_size = 0  # kept up to date by the scheduler
        self.share = ServiceShare()
        self.lease_server = LeaseServer(
            rank, num_ranks, directory, LeaseLedger(capacity_rows), self._refusal
        )
        self.controller = ControllerLink(rank, directory)
        threshold = config.sidp_batch_threshold
        self.modes = StepModes(
            ModePolicy(config.sidp_mode),
            LeaseClient(rank, directory, sorted(set(owners) - {rank})),
            max_rows,
            None if isinstance(threshold, str) else threshold,
        )
        self._own_dispatch = config.own_dispatch

    def start(self) -> None:
        self.lease_server.start()

    def _refusal(self) -> str | None:
        """Why this rank does not serve now; called by the lease server's thread."""
        return decline_reason(self.share.share(time.monotonic()), self.own_batch_size)

    def publish(self, state: RankState) -> None:
        """After one of the scheduler's iterations; nobody hears it but a controller of ours."""
        if self._own_dispatch:
            self.controller.publish(state, time.monotonic())

    def status(self) -> dict[str, Any]:
        """Mode and switches, for the `sidp` dictionary."""
        modes = self.modes
        return {
            "mode": modes.policy.mode,
            "batch_threshold": modes.threshold,
            "mode_switches": modes.policy.switches,
            "mode_switch_reasons": dict(modes.policy.reasons),
            "iterations": dict(modes.steps),
        }

    def dispatch_status(self) -> dict[str, Any]:
        """What the DP controller said last, the same on all ranks."""
        method = OWN_DISPATCH if self._own_dispatch else "sglang"
        return {"method": method, **structs.asdict(self.controller.update)}

    def cas_counters(self) -> dict[str, Any]:
        """Messages sent and answered; times in seconds."""
        server, client, controller = self.lease_server, self.modes.leases, self.controller
        negotiation = client.negotiation
        outboxes = client.outbox, server.outbox, controller.outbox
        inboxes = client.inbox, server.inbox, controller.inbox
        return {
            "requests": negotiation.requests,
            "granted": negotiation.granted,
            "declined": negotiation.declined,
            "silent": client.silences,
            "stale": negotiation.stale,
            "declines_given": dict(server.declines),
            "sent_messages": sum(outbox.sent for outbox in outboxes),
            "dropped_messages": sum(outbox.dropped for outbox in outboxes),
            "malformed_messages": sum(inbox.malformed for inbox in inboxes),
            "negotiation_seconds": client.wait_seconds,
            "service_share": self.share.share(time.monotonic()),
        }

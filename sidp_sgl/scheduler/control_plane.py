"""One rank's control plane put together: leases for others, its own modes, the DP controller.

It lives on TP rank 0; what it decides is shared with the others.
"""

import time
from typing import Any

from sidp_sgl.config import SidpConfig
from sidp_sgl.scheduler.dispatch.link import ControllerLink
from sidp_sgl.scheduler.messages import RankState
from sidp_sgl.scheduler.modes.lease_client import LeaseClient
from sidp_sgl.scheduler.modes.lease_server import LeaseServer
from sidp_sgl.scheduler.modes.policy import ModePolicy
from sidp_sgl.scheduler.modes.service_share import ServiceShare, decline_reason
from sidp_sgl.scheduler.modes.step_modes import StepModes


class ControlPlane:
    """Nothing is sent before `allow`."""

    def __init__(
        self,
        config: SidpConfig,
        rank: int,
        num_ranks: int,
        engine: str,
        share: ServiceShare,
    ) -> None:
        self.rank = rank
        self.own_batch_size = 0  # kept up to date by the scheduler
        self.share = share
        self.lease_server = LeaseServer(rank, num_ranks, engine, self._refusal)
        self.controller = ControllerLink(rank, engine)
        threshold = config.sidp_batch_threshold
        self.modes = StepModes(
            ModePolicy(config.sidp_mode),
            LeaseClient(rank, engine, [n for n in range(num_ranks) if n != rank]),
            None if isinstance(threshold, str) else threshold,
        )
        self._own_dispatch = config.own_dispatch

    def start(self) -> None:
        self.lease_server.start()

    def allow(self, rows_per_rank: int) -> None:
        """From now on ranks may send so many rows in a step."""
        self.lease_server.rows_per_rank = self.modes.max_rows = rows_per_rank

    def _refusal(self) -> str | None:
        """Why this rank does not serve now; called by the lease server's thread."""
        return decline_reason(self.share.share(time.monotonic()), self.own_batch_size)

    def publish(self, state: RankState) -> None:
        """After one of the scheduler's iterations; nobody hears it but a controller of ours."""
        if self._own_dispatch:
            self.controller.publish(state, time.monotonic())

    def cas_figures(self) -> dict[str, Any]:
        """What it has to say in a rank's status of CaS; times in seconds."""
        client, server = self.modes.leases, self.lease_server
        negotiation = client.negotiation
        inboxes = client.inbox, server.inbox, self.controller.inbox
        outboxes = client.outbox, server.outbox, self.controller.outbox
        return {
            "rows_per_rank": server.rows_per_rank,
            "requests": negotiation.requests,
            "granted": negotiation.granted,
            "declined": negotiation.declined,
            "silent": client.silences,
            "stale": negotiation.stale,
            "negotiation_seconds": client.wait_seconds,
            "service_share": self.share.share(time.monotonic()),
            "declines_given": dict(server.declines),
            "sent_messages": sum(outbox.sent for outbox in outboxes),
            "dropped_messages": sum(outbox.dropped for outbox in outboxes),
            "malformed_messages": sum(inbox.malformed for inbox in inboxes),
        }

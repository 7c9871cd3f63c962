"""One rank's part in CaS put together: its calls to owners, and its service to requesters."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from sidp_sgl.weightpool.cas.mailbox import Mailbox
from sidp_sgl.weightpool.cas.requester import Requester, RequesterCounters
from sidp_sgl.weightpool.cas.service import Service, ServiceCounters
from sidp_sgl.weightpool.cas.staging import Staging
from sidp_sgl.weightpool.cas.unit import PooledUnit


class CasEndpoint:
    """`owned`: the units of the blocks that this rank owns, which its service computes; `on_busy`
    and `on_failure` as `Service`."""

    def __init__(
        self,
        mailbox: Mailbox,
        staging: Staging,
        owned: Sequence[PooledUnit],
        on_busy: Callable[[float, float], None] = lambda start, end: None,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        self.mailbox = mailbox
        self.requester = Requester(mailbox, staging)
        served = {unit.number: unit for unit in mailbox.prepare(owned)}
        self.service = Service(mailbox, served, on_busy, on_failure)

    def counters(self) -> dict[str, Any]:
        """What was sent and served; times in seconds."""
        return _as_dict(self.requester.counters, self.service.counters)


def no_counters() -> dict[str, Any]:
    """Those of a rank without a compute service."""
    return _as_dict(RequesterCounters(), ServiceCounters())


def _as_dict(requester: RequesterCounters, service: ServiceCounters) -> dict[str, Any]:
    """`calls` are those sent."""
    return {**asdict(service), **asdict(requester)}

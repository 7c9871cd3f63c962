"""One rank's part in CaS put together: its calls to owners, and its service to requesters."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from sidp_sgl.weightpool.cas.calls import Calls
from sidp_sgl.weightpool.cas.requester import RemoteCounters, RemoteUnits
from sidp_sgl.weightpool.cas.service import ComputeService, ServiceCounters
from sidp_sgl.weightpool.cas.staging import Staging
from sidp_sgl.weightpool.cas.unit import PooledUnit


class ComputeGroup:
    """`units`: all units of the model; the service computes `owned` ones."""

    def __init__(
        self,
        calls: Calls,
        staging: Staging,
        owned: Sequence[PooledUnit],
        on_busy: Callable[[float, float], None],
    ) -> None:
        self.calls = calls
        self.remote = RemoteUnits(calls, staging)
        served = {unit.number: unit for unit in calls.prepare(owned)}
        self.service = ComputeService(calls, served, on_busy)

    def counters(self) -> dict[str, Any]:
        """What was sent and served; times in seconds."""
        return _as_dict(self.remote.counters, self.service.counters)


def no_counters() -> dict[str, Any]:
    """Those of a rank without a compute service."""
    return _as_dict(RemoteCounters(), ServiceCounters())


def _as_dict(remote: RemoteCounters, service: ServiceCounters) -> dict[str, Any]:
    """`calls` are those sent."""
    return {**asdict(service), **asdict(remote)}

"""Groups of ranks behind a dispatcher: the loop over arrivals and ends of steps.

Deterministic: the same requests, settings and seed give the same report.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from bench.simulator.costs import StepCosts
from bench.simulator.dispatch import METHODS, ROUND_ROBIN, Dispatcher, Load
from bench.simulator.job import Request
from bench.simulator.modes import RankModes, Service
from bench.simulator.rank import Rank
from bench.simulator.rank_queue import RankQueue
from bench.simulator.report import Report
from sidp_sgl.planner.deployment import Deployment


@dataclass(frozen=True)
class Settings:
    """What the simulated engines are set to, by SGLang's words.

    `ignore_eos`: every request says how long it gets, and admission reserves all of it.

    `load_balance_method` is that of a group's ranks, `group_balance_method` that of the dispatcher
    before the groups. `jitter`: standard deviation of a step's time over the time.
    """

    chunked_prefill_size: int = 8192  # tokens
    ignore_eos: bool = False
    max_running_requests: int | None = None  # of one rank; None: as SGLang limits it
    load_balance_method: str = ROUND_ROBIN
    group_balance_method: str = ROUND_ROBIN
    batch_threshold: int | None = None  # --sidp-batch-threshold; None is "auto"
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for method in (self.load_balance_method, self.group_balance_method):
            if method not in METHODS:
                raise ValueError(f"no such load balance method: {method}")
        if self.chunked_prefill_size < 1 or not 0 <= self.jitter < 1:
            raise ValueError("chunked_prefill_size is 1 or more, jitter between 0 and 1")
        if self.max_running_requests is not None and self.max_running_requests < 1:
            raise ValueError("max_running_requests is 1 or more")


_DEFAULTS = Settings()


class Group:
    """The ranks of one engine, and its dispatcher."""

    def __init__(self, ranks: Sequence[Rank], load: Load, method: str) -> None:
        self.ranks = ranks
        self.load = load
        self._dispatcher = Dispatcher(method)

    def choose(self) -> Rank:
        return self._dispatcher.choose(self.ranks)


def simulate(
    deployment: Deployment,
    requests: Sequence[Request],
    num_groups: int = 1,
    settings: Settings = _DEFAULTS,
    seed: int = 0,
) -> Report:
    """Run `requests` (in order of arrival, copied) on `num_groups` groups of `deployment`.

    Raises ValueError where a request does not fit on a rank, or the deployment is not modelled.
    """
    if num_groups < 1:
        raise ValueError("one group at least")
    groups = _make_groups(deployment, num_groups, settings, seed)
    ranks = [rank for group in groups for rank in group.ranks]
    copies = [replace(request) for request in requests]
    makespan = _run(groups, ranks, copies, settings)
    reports = tuple(rank.close() for rank in ranks)
    return Report(makespan, reports, tuple(copies))


def _make_groups(
    deployment: Deployment, num_groups: int, settings: Settings, seed: int
) -> list[Group]:
    costs = StepCosts(deployment)
    capacity = deployment.kv_tokens()
    limit = settings.max_running_requests or deployment.max_running_requests()
    groups = []
    for group in range(num_groups):
        service, load = Service(deployment.dp), Load()
        ranks = []
        for index in range(deployment.dp):
            number = group * deployment.dp + index
            queue = RankQueue(capacity, limit, settings.chunked_prefill_size, settings.ignore_eos)
            modes = (
                RankModes(costs, deployment.mode, settings.batch_threshold, service, index)
                if costs.streams
                else None
            )
            noise = settings.jitter, random.Random(f"{seed} {number}")
            ranks.append(Rank(number, index, queue, costs, service, modes, Load(load), *noise))
        groups.append(Group(ranks, load, settings.load_balance_method))
    return groups


def _run(
    groups: Sequence[Group],
    ranks: Sequence[Rank],
    requests: Sequence[Request],
    settings: Settings,
) -> float:
    """Returns when the last step ends."""
    dispatcher = Dispatcher(settings.group_balance_method)
    events: list[tuple[float, int]] = []  # heap: end of a step, rank
    now, arrived = 0.0, 0
    while events or arrived < len(requests):
        if arrived < len(requests) and (not events or requests[arrived].arrival <= events[0][0]):
            now = requests[arrived].arrival
            woken = set()
            # Whoever comes at the same moment is there before a step begins.
            while arrived < len(requests) and requests[arrived].arrival == now:
                rank = dispatcher.choose(groups).choose()
                rank.submit(requests[arrived])
                arrived += 1
                if not rank.is_busy:
                    woken.add(rank.number)
            for number in sorted(woken):
                _begin(ranks[number], now, events)
            continue
        now, number = heappop(events)
        ranks[number].end(now)
        _begin(ranks[number], now, events)
    assert all(request.finish >= 0 for request in requests), "a request was lost"
    return now


def _begin(rank: Rank, now: float, events: list[tuple[float, int]]) -> None:
    end = rank.begin(now)
    if end is not None:
        heappush(events, (end, rank.number))

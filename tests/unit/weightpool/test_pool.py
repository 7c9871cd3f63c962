"""The pool of a whole group: the right bytes at every use, whatever the timing of the copies.

The negative controls take the events away and must see wrong bytes: what shows that the other
tests could fail.
"""

import random

import pytest

from sidp_sgl.weightpool.transport.interface import Transport
from sidp_sgl.weightpool.transport.shm.transport import ShmTransport
from tests.support.hazards import HazardousTransport
from tests.support.host_model import HostModel
from tests.support.pools import Group, RankUnderTest, Result, layer_bytes, run_group
from tests.support.transports import KINDS, make_transport

STEPS = 5


def expected_host(group: Group, rank: int, num_steps: int) -> HostModel:
    host = HostModel(group.schedule(rank))
    for _ in range(num_steps):
        for layer in range(group.num_layers):
            host.compute(layer)
    return host


def check(group: Group, results: list[Result], num_steps: int) -> None:
    sizes = [layer_bytes(layer) for layer in range(group.num_layers)]
    for rank, result in enumerate(results):
        assert result.wrong == []
        host, placement = expected_host(group, rank, num_steps), result.placement
        missing = [
            sum(s.num_bytes for s in placement.blocks[layer] if s.owner != rank)
            for layer in range(group.num_layers)
        ]
        assert result.counters.fetches == len(host.issued)
        assert result.counters.bytes == sum(missing[layer] for layer in host.issued)
        assert result.counters.resyncs == 0
        assert placement == group.placement()
        assert placement.pooled_bytes == sum(sizes)
        assert result.cache_bytes == placement.cache_bytes(rank)


# Fewer layers than ranks, not divisible; orders, placements, slots (None: the default), stripes.
GROUPS = [
    Group(2, 7, num_slots=1, turns=False),
    Group(2, 7, kind="contiguous", num_slots=2),
    Group(2, 7, "shifted", turns=False),
    Group(3, 7, kind="contiguous", num_slots=3, turns=False),
    Group(3, 7, num_slots=50),
    Group(3, 7, "shifted", "contiguous", turns=False),
    Group(4, 8, num_slots=50, turns=False),
    Group(4, 8, kind="contiguous", num_slots=1),
    Group(4, 8, num_slots=3),
    Group(4, 8, "shifted", num_slots=6, turns=False),
    Group(4, 3, kind="contiguous", num_slots=2, turns=False),
    Group(4, 3),
    Group(4, 3, "shifted", "contiguous", 50, turns=False),
    Group(8, 13, num_slots=7, turns=False),
    Group(8, 13, kind="contiguous", num_slots=3),
    Group(8, 13, "shifted", turns=False),
    Group(5, 1, kind="contiguous", num_slots=1, turns=False),
    Group(5, 1),
    Group(2, 2, num_slots=1),
    Group(2, 5, stripes=True),
    Group(3, 7, num_slots=1, stripes=True, turns=False),
    Group(4, 6, num_slots=50, stripes=True),
]


def name_of(group: Group) -> str:
    return "-".join(str(value) for value in vars(group).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", GROUPS, ids=name_of)
def test_every_use_of_a_layer_sees_its_bytes(group: Group, kind: str) -> None:
    results = run_group(
        group, lambda rank: rank.run_steps(STEPS), lambda rank: make_transport(kind)
    )
    check(group, results, STEPS)


@pytest.mark.parametrize(
    ("order", "turns"), [("sequential", False), ("shifted", False), ("sequential", True)]
)
def test_over_a_paced_link(order: str, turns: bool) -> None:
    group = Group(4, 9, order, turns=turns)
    results = run_group(group, lambda rank: rank.run_steps(2), lambda rank: ShmTransport(2e6))
    check(group, results, 2)
    assert all(result.counters.stall_seconds > 0 for result in results)


HAZARDOUS = [
    Group(2, 7, num_slots=1),
    Group(3, 8, num_slots=2),
    Group(4, 9, num_slots=3),
    Group(4, 9, "shifted", turns=False),
    Group(3, 7, kind="contiguous", num_slots=2, turns=False),
]


@pytest.mark.parametrize("group", HAZARDOUS, ids=name_of)
def test_late_and_torn_copies_on_a_gpus_streams_do_no_harm(group: Group) -> None:
    results = run_group(
        group, lambda rank: rank.run_steps(STEPS), lambda rank: make_transport("cuda", seed=rank)
    )
    check(group, results, STEPS)


@pytest.mark.parametrize("group", HAZARDOUS, ids=name_of)
@pytest.mark.parametrize("reorder", [False, True], ids=["late", "reordered"])
def test_late_torn_and_reordered_copies_do_no_harm(group: Group, reorder: bool) -> None:
    results = run_group(
        group,
        lambda rank: rank.run_steps(STEPS),
        lambda rank: HazardousTransport(rank, reorder=reorder),
    )
    check(group, results, STEPS)


def wrong_uses(group: Group, **fault: bool) -> int:
    results = run_group(
        group,
        lambda rank: rank.run_steps(STEPS),
        lambda rank: HazardousTransport(rank, reorder=True, **fault),
    )
    return sum(len(result.wrong) for result in results)


@pytest.mark.parametrize("group", HAZARDOUS, ids=name_of)
def test_negative_control_without_the_wait_for_ready(group: Group) -> None:
    assert wrong_uses(group, ignore_ready=True) > 0


@pytest.mark.parametrize("group", HAZARDOUS, ids=name_of)
def test_negative_control_without_the_wait_for_released(group: Group) -> None:
    assert wrong_uses(group, ignore_released=True) > 0


def cut_short(num_layers: int, seed: int) -> list[list[tuple[str, int]]]:
    """Steps as (what, layer): some stop between layers, some within one; the last are whole."""
    dice = random.Random(seed)
    steps = []
    for _ in range(6):
        stop = dice.randrange(num_layers)
        step = [(what, layer) for layer in range(stop) for what in ("enter", "leave")]
        steps.append([*step, ("enter", stop)] if dice.random() < 0.5 else step)
    whole = [(what, layer) for layer in range(num_layers) for what in ("enter", "leave")]
    return [*steps, whole, whole]


CUT_SHORT = [
    Group(3, 8),
    Group(4, 9, "shifted", turns=False),
    Group(2, 7, num_slots=1, turns=False),
    Group(3, 6, stripes=True),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["shm", "hazardous", "cuda"])
@pytest.mark.parametrize("group", CUT_SHORT, ids=name_of)
def test_steps_cut_short_resync_and_stay_right(group: Group, kind: str, seed: int) -> None:
    steps = cut_short(group.num_layers, seed)

    def script(rank: RankUnderTest) -> None:
        for rank.step, step in enumerate(steps):
            for what, layer in step:
                getattr(rank, what)(layer)

    def transport_of(rank: int) -> Transport:
        if kind == "hazardous":
            return HazardousTransport(rank, reorder=True)
        return make_transport(kind, seed=rank)

    results = run_group(group, script, transport_of)
    for rank, result in enumerate(results):
        assert result.wrong == []
        host = HostModel(group.schedule(rank))
        for step in steps:
            for what, layer in step:
                getattr(host, what)(layer)
        assert result.counters.resyncs == host.restarts
        assert result.counters.fetches == len(host.issued)
    assert any(result.counters.resyncs for result in results)


def test_a_rank_that_ends_early_holds_nobody_up() -> None:
    """Its blocks stay readable, and it leaves no turn taken."""
    group = Group(4, 8)
    results = run_group(group, lambda rank: rank.run_steps(1 if rank.pool.rank == 0 else 20))
    assert [result.wrong for result in results] == [[], [], [], []]

"""Blocks against their owners' checksums: every planted fault is found, and no other."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from sidp_sgl.errors import SidpError
from sidp_sgl.weightpool.self_check.blocks import (
    CAPTURED,
    EAGER,
    IN_PLACE,
    RUNNING,
    BlockCheck,
    Fault,
    raise_first,
)
from sidp_sgl.weightpool.transport.interface import Transport
from tests.support.faults import Plant
from tests.support.hazards import HazardousTransport
from tests.support.pools import Group, RankUnderTest, run_group
from tests.support.transports import KINDS, make_transport

GROUPS = [
    Group(2, 7, num_slots=1),
    Group(3, 8),
    Group(3, 5, num_slots=50),
    Group(4, 9, kind="contiguous"),
    Group(4, 9, "shifted", turns=False),
    Group(3, 7, num_slots=2, stripes=True),
    Group(4, 3),
    Group(5, 1),
    Group(3, 8, unfetched=frozenset({0, 4})),
]
READER, OWNER = 0, 1


def name_of(group: Group) -> str:
    return "-".join(str(value) for value in vars(group).values())


def faults_of(
    group: Group,
    transport_of: Callable[[int], Transport],
    *,
    captures: bool = False,
    steps: int = 0,
) -> list[list[Fault]]:
    """What every rank finds; `steps` afterwards are right."""
    found: dict[int, list[Fault]] = {}

    def script(rank: RankUnderTest) -> None:
        check = BlockCheck(rank.pool)
        faults = check.fetch() + check.read_in_place()
        if captures and not rank.pool.prefetcher.keeps_all:
            faults += check.fetch_captured()
        found[rank.pool.rank] = faults
        rank.run_steps(steps)

    results = run_group(group, script, transport_of)
    assert all(not result.wrong for result in results)
    return [found[rank] for rank in range(group.num_ranks)]


@pytest.mark.parametrize("kind", [*KINDS, "late"])
@pytest.mark.parametrize("group", GROUPS, ids=name_of)
def test_nothing_is_found_where_nothing_is_wrong(group: Group, kind: str) -> None:
    def transport_of(rank: int) -> Transport:
        return make_transport("cuda", seed=rank) if kind == "late" else make_transport(kind)

    assert not any(faults_of(group, transport_of, captures=kind != "shm", steps=2))


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_found_where_copies_are_late_and_torn(seed: int) -> None:
    group = Group(4, 9)
    assert not any(
        faults_of(group, lambda rank: HazardousTransport(seed + rank, reorder=True), steps=2)
    )


PLANTS: dict[str, Callable[[Plant], None]] = {
    "wrong byte": Plant.wrong_byte,
    "stale slot": Plant.stale_slot,
    "torn copy": Plant.torn_copy,
    "swapped owner": lambda plant: plant.swapped_owner(2),
}


def planted(kind: str, fault: str, *, only_captured: bool = False) -> Callable[[int], Transport]:
    def transport_of(rank: int) -> Transport:
        transport = make_transport(kind)
        if rank == READER:
            PLANTS[fault](Plant(transport, OWNER, only_captured=only_captured))
        return transport

    return transport_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", PLANTS)
@pytest.mark.parametrize(
    "group",
    [Group(3, 9), Group(3, 9, num_slots=50), Group(3, 6, num_slots=1, stripes=True)],
    ids=name_of,
)
def test_a_fault_is_found_where_it_is(group: Group, fault: str, kind: str) -> None:
    faults = faults_of(group, planted(kind, fault))
    placement = group.placement()
    hit = [block for block in placement.fetched(READER) if OWNER in placement.owners(block)]
    assert faults[READER] == [Fault(block, OWNER, EAGER) for block in hit]
    assert not any(faults[READER + 1 :])


@pytest.mark.parametrize("fault", PLANTS)
def test_a_fault_of_a_graph_is_found_there(fault: str) -> None:
    group = Group(3, 9)
    faults = faults_of(group, planted("cuda", fault, only_captured=True), captures=True)
    assert faults[READER] == [Fault(block, OWNER, CAPTURED) for block in (1, 4, 7)]
    assert not any(faults[READER + 1 :])


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_wait_for_the_fetch_is_found(kind: str) -> None:
    def transport_of(rank: int) -> Transport:
        transport = make_transport(kind)
        if rank == READER:
            Plant(transport).no_wait_for_ready()
        return transport

    faults = faults_of(Group(2, 8), transport_of)
    assert {fault.path for fault in faults[READER]} == {EAGER} and not faults[1]


def test_a_missing_wait_for_the_slot_is_found() -> None:
    """Where the compute runs beside the host."""

    def transport_of(rank: int) -> Transport:
        transport = make_transport("cuda")
        if rank == READER:
            Plant(transport).no_wait_for_released()
        return transport

    faults = faults_of(Group(2, 12, num_slots=2), transport_of)
    assert {fault.path for fault in faults[READER]} == {EAGER} and not faults[1]


class Forgetful(dict):
    """Knows of no release."""

    def get(self, *_: object) -> None:
        return None


@pytest.mark.parametrize("event", ["ready", "released"])
def test_a_missing_edge_of_a_graph_is_found(event: str) -> None:
    group, found = Group(4, 12, num_slots=2), {}

    def script(rank: RankUnderTest) -> None:
        with rank.pool.step():
            pass
        step = rank.pool._step
        assert step is not None
        if event == "ready":
            step.acquire = lambda block: None  # type: ignore[method-assign]
        else:
            step._last_release = Forgetful()
        check = BlockCheck(rank.pool)
        found[rank.pool.rank] = check.fetch(), check.fetch_captured()

    run_group(group, script, lambda rank: make_transport("cuda", seed=rank))
    assert not any(eager for eager, _ in found.values())
    assert any(captured for _, captured in found.values())


def test_a_block_that_is_read_where_it_lies() -> None:
    """Its owner has changed it since."""
    group, found = Group(2, 4, unfetched=frozenset({1})), {}

    def script(rank: RankUnderTest) -> None:
        check = BlockCheck(rank.pool)
        if rank.pool.rank == READER:
            found["before"] = check.read_in_place()
            stripe = check._of[1][0].stripe
            check._of[1][0] = replace(
                check._of[1][0], stripe=replace(stripe, data=stripe.data.clone().fill_(3))
            )
            found["after"] = check.read_in_place()

    run_group(group, script)
    assert found == {"before": [], "after": [Fault(1, 1, IN_PLACE)]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_slots", [3, 50])
def test_a_look_between_steps(kind: str, num_slots: int) -> None:
    """It disturbs nothing, comes to every block that is held, and sees a byte that has changed."""
    group, found = Group(3, 9, num_slots=num_slots), {}

    def script(rank: RankUnderTest) -> None:
        check, looks = BlockCheck(rank.pool), []
        for number in range(8):
            rank.run_steps(1)
            looks.append(check.look(number))
        assert not any(looks) and rank.pool.prefetcher.counters.resyncs == 0
        rank.pool.transport.synchronize()
        slot = rank.pool.prefetcher.slots[0]
        rank.pool.enter(slot.block)  # its fetch has ended
        rank.pool.transport.synchronize()
        slot.memory[5] ^= 8
        found[rank.pool.rank] = slot.block, [check.look(number) for number in range(num_slots)]
        slot.memory[5] ^= 8
        rank.run_steps(1)

    assert not any(
        result.wrong for result in run_group(group, script, lambda _: make_transport(kind))
    )
    for rank in range(group.num_ranks):
        block, looks = found[rank]
        hit = Fault(block, group.owners()[block], RUNNING)
        held = min(num_slots, len(group.schedule(rank).order))
        assert [faults for faults in looks[:held] if faults] == [[hit]]


def test_a_fault_is_said_in_one_line() -> None:
    raise_first([], 0)
    faults = [Fault(3, 1, EAGER), Fault(5, 2, CAPTURED)]
    with pytest.raises(SidpError) as raised:
        raise_first(faults, 4)
    text = str(raised.value)
    assert text.startswith("--sidp-self-check: block 3 of DP rank 1 has other bytes at DP rank 4")
    assert EAGER in text and "1 more" in text and "\n" not in text

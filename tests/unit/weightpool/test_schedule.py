"""Orders of fetches and the slots they go to: complete, in range, free of deadlock."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from sidp_sgl.weightpool.placement import Placement
from sidp_sgl.weightpool.schedule import (
    ORDERS,
    FetchSchedule,
    assign_slots,
    make_schedule,
    shifted_slots,
)
from tests.support.host_model import HostModel

PLACEMENTS = ("interleaved", "contiguous")


@st.composite
def schedules(draw: st.DrawFn, orders: tuple[str, ...] = ORDERS) -> tuple[FetchSchedule, int]:
    """A rank's schedule, with the number of layers."""
    num_layers, num_ranks = draw(st.integers(0, 40)), draw(st.integers(2, 10))
    rank = draw(st.integers(0, num_ranks - 1))
    order = draw(st.sampled_from(orders))
    placement = uniform(num_layers, num_ranks, draw(st.sampled_from(PLACEMENTS)))
    fewest = shifted_slots(placement, rank) if order == "shifted" else 1
    placement = replace(placement, num_slots=draw(st.integers(max(1, fewest), 45)))
    return make_schedule(placement, rank, order), num_layers


def uniform(num_layers: int, num_ranks: int, kind: str, num_slots: int = 3) -> Placement:
    return Placement.of([1] * num_layers, num_ranks, num_slots, kind)


def cyclic_distances(slots: list[int]) -> list[int]:
    """For every position, how many positions ago its slot was used last, around the end."""
    count = len(slots)
    return [
        next(back for back in range(1, count + 1) if slots[position - back] == slots[position])
        for position in range(count)
    ]


@given(
    st.integers(0, 60),
    st.integers(2, 12),
    st.sampled_from(PLACEMENTS),
    st.sampled_from(ORDERS),
    st.data(),
)
def test_every_foreign_layer_is_fetched_once_into_a_slot_in_range(
    num_layers: int, num_ranks: int, placement: str, order: str, data: st.DataObject
) -> None:
    of_blocks = uniform(num_layers, num_ranks, placement)
    num_slots = max(3, shifted_slots(of_blocks)) + data.draw(st.integers(0, 10))
    of_blocks = replace(of_blocks, num_slots=num_slots)
    for rank in range(num_ranks):
        schedule = make_schedule(of_blocks, rank, order)
        fetched = [n for n in range(num_layers) if of_blocks.owners(n) != (rank,)]
        assert sorted(schedule.order) == fetched
        assert set(schedule.slot_of) == set(fetched)
        assert schedule.num_slots <= num_slots
        used = set(schedule.slot_of.values())
        assert used <= set(range(schedule.num_slots))
        if order != "shifted":
            assert len(used) == min(num_slots, len(fetched)), "none lies idle"


@given(schedules(), st.integers(1, 4))
def test_steps_never_deadlock_nor_restart(
    schedule_and_layers: tuple[FetchSchedule, int], num_steps: int
) -> None:
    schedule, num_layers = schedule_and_layers
    host = HostModel(schedule)
    for _, layer in product(range(num_steps), range(num_layers)):
        host.compute(layer)
    assert host.restarts == 0
    if schedule.keeps_all:
        assert sorted(host.issued) == sorted(schedule.order)
    else:
        ahead = len(host.issued) - num_steps * len(schedule.order)
        assert 0 <= ahead <= schedule.num_slots
        repeated = schedule.order * (num_steps + 1)
        assert tuple(host.issued) == repeated[: len(host.issued)]


@given(schedules(), st.data())
def test_a_restart_at_any_layer_goes_on(
    schedule_and_layers: tuple[FetchSchedule, int], data: st.DataObject
) -> None:
    schedule, num_layers = schedule_and_layers
    assume(schedule.order)
    host = HostModel(schedule)
    layers = st.integers(0, num_layers - 1)
    for stop in data.draw(st.lists(layers, max_size=3)):  # steps that are cut short
        for layer in range(stop):
            host.compute(layer)
    first = data.draw(layers)  # and one that starts in the middle
    for layer in range(first, num_layers):
        host.compute(layer)
    before = host.restarts
    for _, layer in product(range(4), range(num_layers)):
        host.compute(layer)
    assert host.restarts - before <= 2, "the host is in step again"


@given(schedules(orders=("sequential",)), st.data())
def test_need_orders_restart_with_the_layer_itself(
    schedule_and_layers: tuple[FetchSchedule, int], data: st.DataObject
) -> None:
    schedule, _ = schedule_and_layers
    assume(schedule.order)
    layer = data.draw(st.sampled_from(schedule.order))
    assert schedule.order[schedule.restart_position(layer)] == layer


@given(st.integers(1, 80), st.integers(1, 12))
@example(7, 3)
@example(4, 3)
def test_slots_come_back_as_late_as_possible(num_layers: int, num_slots: int) -> None:
    assume(num_slots <= num_layers)
    slots = assign_slots(num_layers, num_slots)
    assert len(slots) == num_layers
    assert set(slots) == set(range(num_slots)), "none lies idle"
    distances = cyclic_distances(slots)
    if num_layers % num_slots == 0:
        assert min(distances) == num_slots
    else:
        # One slot fewer is the best that any assignment can do, and done up to three slots.
        assert min(distances) >= (num_slots - 1 if num_slots <= 3 else num_slots // 2)
        late = sum(distance >= num_slots - 1 for distance in distances)
        assert late >= num_layers - 2 * num_slots, "all but some where one step meets the next"


@given(st.integers(1, 60), st.integers(2, 12), st.data())
def test_shifted_is_the_papers_order(num_layers: int, num_ranks: int, data: st.DataObject) -> None:
    """arXiv 2605.28095: in the cycle that starts at layer c, rank r starts at layer c + r and
    wraps around within the cycle, skipping its own layer."""
    rank = data.draw(st.integers(0, num_ranks - 1))
    placement = uniform(num_layers, num_ranks, "interleaved", num_ranks)
    expected = []
    for cycle in range(0, num_layers, num_ranks):
        around = [cycle + (rank + turn) % num_ranks for turn in range(num_ranks)]
        expected += [n for n in around if n < num_layers and placement.owners(n) != (rank,)]
    schedule = make_schedule(placement, rank, "shifted")
    assert list(schedule.order) == expected


@given(st.integers(1, 60), st.integers(2, 12), st.sampled_from(PLACEMENTS))
def test_shifted_needs_the_slots_of_a_cycle(num_layers: int, num_ranks: int, kind: str) -> None:
    placement = uniform(num_layers, num_ranks, kind)
    slots = shifted_slots(placement)
    if kind == "interleaved" and num_layers >= num_ranks:
        assert slots == num_ranks - 1, "the paper's number"
    for rank in range(num_ranks):
        fetched = len(placement.fetched(rank))
        needed = shifted_slots(placement, rank)
        assert needed <= min(slots, fetched)
        if 1 < needed < fetched:
            with pytest.raises(ValueError, match=f"needs {needed} slots"):
                make_schedule(replace(placement, num_slots=needed - 1), rank, "shifted")

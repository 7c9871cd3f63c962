"""Which block goes into which slot, and in which order blocks are fetched. Pure.

A step uses the blocks in order, step after step. A rank fetches those that it does not own: a
schedule fixes block → slot (addresses never change, so CUDA graphs can hold them) and the order in
which fetches are issued, which repeats every step.
"""

from dataclasses import dataclass

from sidp_sgl.weightpool.placement import Placement

ORDERS = ("sequential", "shifted")


@dataclass(frozen=True)
class FetchSchedule:
    """One rank's fetches: `order` of the fetched blocks within a step, and their slots."""

    order: tuple[int, ...]  # fetched blocks in the order of issue; repeats every step
    slot_of: dict[int, int]  # fetched block → slot
    num_slots: int

    @property
    def keeps_all(self) -> bool:
        """Whether every fetched block has a slot of its own: one fetch each is enough."""
        return len(set(self.slot_of.values())) == len(self.slot_of)

    def restart_position(self, block: int) -> int:
        """Position in `order` from which `block` is reached without waiting for a release."""
        position = taken = self.order.index(block)
        seen = {self.slot_of[block]}
        while position > 0 and self.slot_of[self.order[position - 1]] not in seen:
            position -= 1
            seen.add(self.slot_of[self.order[position]])
        # In need order everything before `block` would be fetched for nothing.
        in_need_order = self.order == tuple(sorted(self.order))
        return taken if in_need_order else position


def make_schedule(placement: Placement, rank: int, order: str = "sequential") -> FetchSchedule:
    """The schedule of `rank`: in the order of need, or the paper's (`shifted`).

    Raises ValueError where the slots are too few for the order.
    """
    fetched, num_slots = placement.fetched(rank), placement.slots(rank)
    if order == "shifted":
        return _shifted(placement, rank, fetched, num_slots)
    slots = assign_slots(len(fetched), num_slots)
    return FetchSchedule(tuple(fetched), dict(zip(fetched, slots, strict=True)), num_slots)


def assign_slots(num_blocks: int, num_slots: int) -> list[int]:
    """Slots of the fetched blocks: each comes back as late as possible, also across the step's end.

    Plain rotation (0 1 2 0 1 2 0 | 0 1 2 …) would stop the prefetch where a step ends. So a block
    takes the slot that is farthest from its last use and, in the next step, from its first
    (0 1 2 0 1 2 1 | 0 1 2 …). The later a slot comes back, the earlier its fetch can start.
    """
    slots = list(range(num_slots))
    last_use = list(range(num_slots))  # slot → position

    def distance(slot: int, position: int) -> tuple[int, int]:
        since_last = position - last_use[slot]
        return min(since_last, num_blocks + slot - position), since_last

    for position in range(num_slots, num_blocks):
        slot = max(range(num_slots), key=lambda slot: distance(slot, position))
        slots.append(slot)
        last_use[slot] = position
    return slots


def shifted_slots(placement: Placement, rank: int | None = None) -> int:
    """Slots that the shifted order needs: the most blocks that `rank`, or any rank, fetches in one
    cycle."""
    ranks = range(placement.num_ranks) if rank is None else (rank,)
    cycles = range(0, len(placement.blocks), placement.num_ranks)
    return max(
        (
            sum(cycle <= block < cycle + placement.num_ranks for block in placement.fetched(one))
            for one in ranks
            for cycle in cycles
        ),
        default=0,
    )


def _shifted(placement: Placement, rank: int, fetched: list[int], num_slots: int) -> FetchSchedule:
    """Peak shifting (SiDP, arXiv 2605.28095): in the cycle that starts at block c, rank r starts
    at block c + r and wraps around within the cycle. Slots for k cycles are used in rotation."""
    num_ranks, cycle_slots = placement.num_ranks, shifted_slots(placement, rank)
    if num_slots < cycle_slots:
        raise ValueError(f"the shifted order needs {cycle_slots} slots")
    order: list[int] = []
    slot_of: dict[int, int] = {}
    for cycle in sorted({block // num_ranks for block in fetched}):
        blocks = [block for block in fetched if block // num_ranks == cycle]
        first_slot = cycle % (num_slots // cycle_slots) * cycle_slots
        slot_of.update({block: first_slot + index for index, block in enumerate(blocks)})
        order += sorted(blocks, key=lambda block: (block - rank) % num_ranks)
    if num_slots == len(fetched):
        slot_of = {block: slot for slot, block in enumerate(fetched)}
    return FetchSchedule(tuple(order), slot_of, max(slot_of.values(), default=-1) + 1)

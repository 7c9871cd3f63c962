"""Which layer goes into which slot, and in which order layers are fetched. Pure.

A step uses the layers in order, step after step. A rank fetches the layers that it does not own:
`need` order is layer order; a schedule fixes layer → slot (addresses never change, so CUDA graphs
can hold them) and the order in which fetches are issued, which repeats every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_SLOTS = 3


@dataclass(frozen=True)
class FetchSchedule:
    """One rank's fetches: `order` of the fetched layers within a step, and their slots."""

    order: tuple[int, ...]  # fetched layers in the order of issue; repeats every step
    slot_of: dict[int, int]  # fetched layer → slot
    num_slots: int

    @property
    def resident(self) -> bool:
        """True where every fetched layer has a slot of its own: one fetch each is enough."""
        return len(set(self.slot_of.values())) == len(self.slot_of)

    def restart_position(self, layer: int) -> int:
        """Position in `order` from which `layer` is reached without waiting for a release."""
        position = taken = self.order.index(layer)
        seen = {self.slot_of[layer]}
        while position > 0 and self.slot_of[self.order[position - 1]] not in seen:
            position -= 1
            seen.add(self.slot_of[self.order[position]])
        # In need order everything before `layer` would be fetched for nothing.
        in_need_order = self.order == tuple(sorted(self.order))
        return taken if in_need_order else position


def make_schedule(
    owners: Sequence[int], rank: int, num_ranks: int, prefetch_order: str, num_slots: int
) -> FetchSchedule:
    """The schedule of `rank`. Raises ValueError where `num_slots` could deadlock the order."""
    fetched = [layer for layer, owner in enumerate(owners) if owner != rank]
    num_slots = min(num_slots, len(fetched))
    if not fetched:
        return FetchSchedule((), {}, 0)
    if prefetch_order == "shifted":
        return _shifted(fetched, rank, num_ranks, num_slots, shifted_slots(owners, rank, num_ranks))
    slots = assign_slots(len(fetched), num_slots)
    return FetchSchedule(tuple(fetched), dict(zip(fetched, slots, strict=True)), num_slots)


def assign_slots(num_layers: int, num_slots: int) -> list[int]:
    """Slots of the fetched layers: each comes back as late as possible, also across the step's end.

    Plain turns (0 1 2 0 1 2 0 | 0 1 2 …) would stop the prefetch where a step ends. So a layer
    takes the slot that is farthest from its last use and, in the next step, from its first
    (0 1 2 0 1 2 1 | 0 1 2 …). The later a slot comes back, the earlier its fetch can start.
    """
    slots = list(range(num_slots))
    last_use = list(range(num_slots))  # slot → layer

    def distance(slot: int, layer: int) -> tuple[int, int]:
        since_last = layer - last_use[slot]
        return min(since_last, num_layers + slot - layer), since_last

    for layer in range(num_slots, num_layers):
        slot = max(range(num_slots), key=lambda slot: distance(slot, layer))
        slots.append(slot)
        last_use[slot] = layer
    return slots


def shifted_slots(owners: Sequence[int], rank: int, num_ranks: int) -> int:
    """Slots that the shifted order needs: the most layers that `rank` fetches in one cycle."""
    cycles = range(0, len(owners), num_ranks)
    return max(
        (sum(owner != rank for owner in owners[c : c + num_ranks]) for c in cycles), default=0
    )


def default_slots(owners: Sequence[int], num_ranks: int, prefetch_order: str) -> int:
    """Slots per rank where the user names none; the same on every rank."""
    if prefetch_order == "shifted":
        return max(shifted_slots(owners, rank, num_ranks) for rank in range(num_ranks))
    return DEFAULT_SLOTS


def _shifted(
    fetched: list[int], rank: int, num_ranks: int, num_slots: int, cycle_slots: int
) -> FetchSchedule:
    """Peak shifting (SiDP, arXiv 2605.28095): in the cycle that starts at layer c, rank r starts
    at layer c + r and wraps around within the cycle. Slots for k cycles are used in turn."""
    if num_slots < cycle_slots:
        raise ValueError(f"the shifted order needs {cycle_slots} slots")
    order: list[int] = []
    slot_of: dict[int, int] = {}
    for cycle in sorted({layer // num_ranks for layer in fetched}):
        layers = [layer for layer in fetched if layer // num_ranks == cycle]
        first_slot = cycle % (num_slots // cycle_slots) * cycle_slots
        slot_of.update({layer: first_slot + index for index, layer in enumerate(layers)})
        order += sorted(layers, key=lambda layer: (layer - rank) % num_ranks)
    if num_slots == len(fetched):
        slot_of = {layer: slot for slot, layer in enumerate(fetched)}
    return FetchSchedule(tuple(order), slot_of, max(slot_of.values()) + 1)

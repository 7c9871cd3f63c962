"""What the host of one rank issues, in plain values: the reference for the real prefetcher."""

from dataclasses import dataclass, field

from sidp_sgl.weightpool.schedule import FetchSchedule


@dataclass
class HostModel:
    """Issues the next fetch when its slot is free; computes layers; restarts where out of order."""

    schedule: FetchSchedule
    issued: list[int] = field(default_factory=list)
    restarts: int = 0

    def __post_init__(self) -> None:
        self._holds: list[int | None] = [None] * self.schedule.num_slots
        self._free = [True] * self.schedule.num_slots
        self._next = 0
        self.issue()

    def issue(self) -> None:
        order, slot_of = self.schedule.order, self.schedule.slot_of
        while order and self._free[slot_of[order[self._next]]]:
            layer = order[self._next]
            self._free[slot_of[layer]] = False
            self._holds[slot_of[layer]] = layer
            self.issued.append(layer)
            self._next = (self._next + 1) % len(order)

    def compute(self, layer: int) -> None:
        self.enter(layer)
        self.leave(layer)

    def enter(self, layer: int) -> None:
        """The layer's block must have been issued, at most after a restart: nothing else is going
        to be released before this layer has been computed."""
        slot = self.schedule.slot_of.get(layer)
        if slot is None:
            return
        if self._holds[slot] != layer:
            self.restart_at(layer)
        assert self._holds[slot] == layer, f"deadlock: layer {layer} waits for its own release"

    def leave(self, layer: int) -> None:
        slot = self.schedule.slot_of.get(layer)
        if slot is not None and not self.schedule.keeps_all:
            self._free[slot] = True
            self.issue()

    def restart_at(self, layer: int) -> None:
        self.restarts += 1
        self._holds = [None] * self.schedule.num_slots
        self._free = [True] * self.schedule.num_slots
        self._next = self.schedule.restart_position(layer)
        self.issue()

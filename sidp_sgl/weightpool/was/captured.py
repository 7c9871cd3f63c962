"""The fetches of one step as part of a CUDA graph: what is fetched when, and the graph's edges.

A graph's side streams must join before it ends, and a graph can't wait for what was recorded
outside it. So a captured step begins and ends with the same slots filled, the prefetch for the next
step's first blocks included; only the slot that is released last is filled by the next step's
beginning, for waiting for that fetch would lengthen every step by it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sidp_sgl.weightpool.schedule import FetchSchedule
from sidp_sgl.weightpool.transport.interface import Event, PeerStripe, Transport


@dataclass(frozen=True)
class StepPlan:
    """One captured step. `entry`: slot → block that it holds when the step begins, and again when
    it ends; `first`: blocks that are fetched at once; `after`: block → blocks that are fetched
    when it has been computed; `next_position`: of the schedule's order, after the step."""

    entry: dict[int, int]
    first: tuple[int, ...]
    after: dict[int, tuple[int, ...]]
    next_position: int


def plan_step(schedule: FetchSchedule) -> StepPlan:
    """The steady step of `schedule`, with what the last release lets be fetched put off. Pure."""
    order, slot_of = schedule.order, schedule.slot_of
    holds: dict[int, int] = {}
    after: dict[int, tuple[int, ...]] = {}
    position = 0

    def issue() -> tuple[int, ...]:
        nonlocal position
        issued = []
        while order and slot_of[order[position]] not in holds:
            issued.append(order[position])
            holds[slot_of[order[position]]] = order[position]
            position = (position + 1) % len(order)
        return tuple(issued)

    issue()
    entry: dict[int, int] = {}
    for _ in range(2 + len(order)):  # steps until one ends as it began
        entry, begun = dict(holds), position
        if schedule.keeps_all:
            break
        for block in sorted(order):
            assert holds.get(slot_of[block]) == block, "the schedule deadlocks"
            del holds[slot_of[block]]
            after[block] = issue()
        if (holds, position) == (entry, begun):
            break
    else:
        raise AssertionError("no steady step")
    put_off = after.pop(max(order)) if after else ()
    for block in put_off:
        del entry[slot_of[block]]
    next_position = (position - len(put_off)) % max(len(order), 1)
    return StepPlan(entry, put_off, after, next_position)


class CapturedStep:
    """Captures one step: `begin`, `acquire` and `release` each block that is fetched, `end`.

    All events are of its own: one that was recorded in a capture can't be waited for outside.
    """

    def __init__(
        self,
        transport: Transport,
        schedule: FetchSchedule,
        stripes: Mapping[int, Sequence[PeerStripe]],
        slots: Mapping[int, torch.Tensor],
        *,
        takes_turns: bool,
    ) -> None:
        """`slots`: fetched block → the slot that it is copied into."""
        self.plan = plan_step(schedule)
        self._transport = transport
        self._slot_of = schedule.slot_of
        self._stripes, self._slots = stripes, slots
        self._takes_turns = takes_turns
        self._fork, self._join = transport.event(), transport.event()
        self._ready = {block: transport.event() for block in schedule.order}
        self._released = {block: transport.event() for block in schedule.order}
        self._fetched: set[int] = set()
        self._last_release: dict[int, Event] = {}  # slot → in this step

    def begin(self) -> None:
        """Fork the copy stream from the stream that captures."""
        self._fetched.clear()
        self._last_release.clear()
        self._transport.compute_stream.record(self._fork)
        self._transport.copy_stream.wait(self._fork)
        for block in self.plan.first:
            self._fetch(block)

    def acquire(self, block: int) -> None:
        if block in self._fetched:
            self._transport.compute_stream.wait(self._ready[block])

    def release(self, block: int) -> None:
        slot = self._slot_of[block]
        self._transport.compute_stream.record(self._released[block])
        self._last_release[slot] = self._released[block]
        for following in self.plan.after.get(block, ()):
            self._fetch(following)

    def end(self) -> None:
        """Join: the graph ends when the fetches for the next step have ended."""
        self._transport.copy_stream.record(self._join)
        self._transport.compute_stream.wait(self._join)

    def _fetch(self, block: int) -> None:
        stream = self._transport.copy_stream
        released = self._last_release.get(self._slot_of[block])
        if released is not None:
            stream.wait(released)
        stream.fetch(self._slots[block], self._stripes[block], takes_turns=self._takes_turns)
        stream.record(self._ready[block])
        self._fetched.add(block)

"""The prefetcher: keeps a rank's slots filled ahead of the compute, across the end of the step.

A slot's life: free → fetching → ready → in use → free. The host only decides what is enqueued;
that a slot is not overwritten in use, nor read before it is ready, is ensured by events.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from sidp_sgl.weightpool.schedule import FetchSchedule
from sidp_sgl.weightpool.transport.interface import Event, PeerStripe, Transport
from sidp_sgl.weightpool.was.captured import CapturedStep, StepPlan, plan_step
from sidp_sgl.weightpool.was.counters import FetchCounters
from sidp_sgl.weightpool.was.residents import Residents


@dataclass
class Slot:
    """Memory for one fetched block at a time."""

    memory: torch.Tensor  # [num_bytes] uint8
    ready: Event
    released: Event
    block: int | None = None  # what it holds or is being filled with
    free: bool = True  # the host may enqueue the next fetch


class Prefetcher:
    """Fetches the blocks of one rank's schedule. Used by one thread."""

    def __init__(
        self,
        transport: Transport,
        schedule: FetchSchedule,
        stripes: Mapping[int, Sequence[PeerStripe]],
        slot_bytes: int,
        *,
        rank: int,
        takes_turns: bool,
    ) -> None:
        self.counters = FetchCounters()
        self._transport = transport
        self._schedule = schedule
        self._stripes = stripes
        self._missing_bytes = {
            block: sum(stripe.data.numel() for stripe in parts if stripe.owner != rank)
            for block, parts in stripes.items()
        }
        self._takes_turns = takes_turns
        self.residents = Residents(
            transport, stripes, self.counters, self._missing_bytes, takes_turns=takes_turns
        )
        self._next = 0  # position in schedule.order of the next fetch
        self._is_replayed = False  # whether the latest step was a graph
        self.slots = [
            Slot(
                transport.empty(slot_bytes).zero_(),  # timed before it is filled: no NaN may route
                transport.event(),
                transport.event(),
            )
            for _ in range(schedule.num_slots)
        ]

    @property
    def keeps_all(self) -> bool:
        """Whether every block stays in its slot once it is fetched."""
        return self._schedule.keeps_all

    @property
    def order(self) -> tuple[int, ...]:
        """Fetched blocks in the order of their fetches."""
        return self._schedule.order

    def holds(self, block: int) -> bool:
        """Whether `block` stays here, or is in its slot or on the way there."""
        if block in self.residents:
            return self.residents.is_here(block)
        return self.slot_of(block).block == block

    def slot_of(self, block: int) -> Slot:
        return self.slots[self._schedule.slot_of[block]]

    def memory_of(self, block: int) -> torch.Tensor:
        """Where `block` lies while it is here, [num_bytes] uint8 or more."""
        if block in self.residents:
            return self.residents.memory(block)
        return self.slot_of(block).memory

    def start(self) -> None:
        """Begin to fill the slots."""
        self._fill()

    def capture(self) -> CapturedStep:
        """What enqueues one step's fetches into a graph instead; the state here stays as it is."""
        slots = {block: self.slot_of(block).memory for block in self._schedule.order}
        return CapturedStep(
            self._transport, self._schedule, self._stripes, slots, takes_turns=self._takes_turns
        )

    @cached_property
    def _plan(self) -> StepPlan:
        return plan_step(self._schedule)

    @cached_property
    def _replayed_bytes(self) -> int:
        """Fetched by one captured step."""
        return 0 if self._schedule.keeps_all else sum(self._missing_bytes.values())

    def begin_replay(self) -> None:
        """A captured step is about to be launched on the compute stream. After the first of them
        in a row there is nothing to do, whatever the number of blocks."""
        if not self._is_replayed:
            self._is_replayed = True
            self._prepare_replays()
        self.counters.replays += 1
        if self._replayed_bytes:
            self.counters.fetches += len(self._schedule.order)
            self.counters.bytes += self._replayed_bytes

    def _prepare_replays(self) -> None:
        """Let the slots hold what a captured step begins with, once the compute stream is here."""
        entry = self._plan.entry
        if any(self.slots[slot].block != block for slot, block in entry.items()):
            self._restart_at(self._schedule.order[0])
        assert all(self.slots[slot].block == block for slot, block in entry.items())
        for number, slot in enumerate(self.slots):
            self._transport.compute_stream.wait(slot.ready)
            slot.block = entry.get(number)

    def _end_replays(self) -> None:
        """Go on from where the latest replayed step ends, once the compute stream gets there."""
        if not self._is_replayed:
            return
        self._is_replayed = False
        self._next = self._plan.next_position
        for slot in self.slots:
            slot.free = slot.block is None
            self._transport.compute_stream.record(slot.released)
            self._transport.compute_stream.record(slot.ready)
        self._fill()

    def acquire(self, block: int) -> None:
        """The compute stream may read `block` once this returns (or, on a GPU, once its stream gets
        here)."""
        self._end_replays()
        if block in self.residents:
            self.residents.acquire(block)
            return
        slot = self.slot_of(block)
        if slot.block != block:
            self._restart_at(block)
        started = time.perf_counter()
        self._transport.compute_stream.wait(slot.ready)
        self.counters.stall_seconds += time.perf_counter() - started

    def release(self, block: int) -> None:
        """The compute stream is through with `block`: its slot takes the next fetch."""
        if self._schedule.keeps_all or block in self.residents:
            return
        self._free(self.slot_of(block))

    def _free(self, slot: Slot) -> None:
        self._transport.compute_stream.record(slot.released)
        slot.free = True
        self._fill()

    def keep(self, block: int, memory: torch.Tensor) -> None:
        """From now on `block` lies in `memory`, which is lent, and takes no slot."""
        self.residents.fetch(block, memory)
        slot = self.slot_of(block)
        if slot.block == block:
            slot.block = None
            self._free(slot)

    def drop(self, block: int) -> None:
        """A block that was kept takes its slot again."""
        self.residents.drop(block)
        if all(slot.free for slot in self.slots):
            self._next = 0  # as the next step begins
        self._fill()

    def _fill(self) -> None:
        order = self._schedule.order
        for _ in order:  # at most, for resident blocks are passed over
            block = order[self._next]
            if block not in self.residents:
                if not self.slot_of(block).free:
                    return
                self._fetch(block)
            self._next = (self._next + 1) % len(order)

    def _fetch(self, block: int) -> None:
        slot, stream = self.slot_of(block), self._transport.copy_stream
        slot.block, slot.free = block, False
        stream.wait(slot.released)
        stream.fetch(slot.memory, self._stripes[block], takes_turns=self._takes_turns)
        stream.record(slot.ready)
        self.counters.fetches += 1
        self.counters.bytes += self._missing_bytes[block]

    def _restart_at(self, block: int) -> None:
        """Drop what was prefetched and start anew with `block`. Nothing is in use now; copies
        under way finish first, since the copy stream is in order."""
        self.counters.resyncs += 1
        for slot in self.slots:
            self._transport.compute_stream.record(slot.released)
            slot.free, slot.block = True, None
        self._next = self._schedule.restart_position(block)
        self._fill()

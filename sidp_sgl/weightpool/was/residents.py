"""Blocks of other ranks that stay for now, in memory that is lent: fetched once, dropped at once.

They are copies, so nothing is lost with them. A step that finds all its blocks here is a step of
plain data parallelism.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sidp_sgl.weightpool.transport.interface import Event, PeerStripe, Transport
from sidp_sgl.weightpool.was.counters import FetchCounters


@dataclass
class _Resident:
    """A block's memory, [num_bytes] uint8 or more, and the end of its fetch."""

    memory: torch.Tensor
    ready: Event


class Residents:
    """Of one rank. `missing_bytes`: of each block, what other ranks own of it."""

    def __init__(
        self,
        transport: Transport,
        stripes: Mapping[int, Sequence[PeerStripe]],
        counters: FetchCounters,
        missing_bytes: Mapping[int, int],
        *,
        takes_turns: bool,
    ) -> None:
        self._transport = transport
        self._stripes = stripes
        self._counters = counters
        self._missing_bytes = missing_bytes
        self._takes_turns = takes_turns
        self._blocks: dict[int, _Resident] = {}
        self._fetching: set[int] = set()

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def num_fetching(self) -> int:
        """Blocks that are on their way."""
        self._fetching = {b for b in self._fetching if not self._blocks[b].ready.is_reached()}
        return len(self._fetching)

    def is_here(self, block: int) -> bool:
        """Whether the fetch of a resident block has ended."""
        return block not in self._fetching or self._blocks[block].ready.is_reached()

    def memory(self, block: int) -> torch.Tensor:
        return self._blocks[block].memory

    def fetch(self, block: int, memory: torch.Tensor) -> None:
        """Fetch `block` into `memory`, which is lent from now on: its old content is dead once the
        compute stream has come to where it is now."""
        lent, ready = self._transport.event(), self._transport.event()
        stream = self._transport.copy_stream
        self._transport.compute_stream.record(lent)
        stream.wait(lent)
        stream.fetch(memory, self._stripes[block], takes_turns=self._takes_turns)
        stream.record(ready)
        self._blocks[block] = _Resident(memory, ready)
        self._fetching.add(block)
        self._counters.fetches += 1
        self._counters.bytes += self._missing_bytes[block]

    def acquire(self, block: int) -> None:
        """The compute stream may read `block` once this returns (or, on a GPU, once its stream gets
        here)."""
        if block in self._fetching:
            started = time.perf_counter()
            self._transport.compute_stream.wait(self._blocks[block].ready)
            self._counters.stall_seconds += time.perf_counter() - started

    def drop(self, block: int) -> None:
        """What the compute stream does from here on may write to the block's memory."""
        resident = self._blocks.pop(block)
        self._fetching.discard(block)
        self._transport.compute_stream.wait(resident.ready)

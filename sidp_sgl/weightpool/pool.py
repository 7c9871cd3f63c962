"""One rank's share of the pooled weights: blocks that it owns, slots for those that it fetches."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sidp_sgl.weightpool.layout import BlockLayout
from sidp_sgl.weightpool.schedule import make_schedule
from sidp_sgl.weightpool.transport.interface import PeerBlock, Transport
from sidp_sgl.weightpool.was.captured import CapturedStep
from sidp_sgl.weightpool.was.prefetch import Prefetcher


@dataclass(frozen=True)
class PoolBytes:
    """Sizes in bytes, the same names as in the status."""

    pooled_bytes: int  # all blocks of the group
    owned_bytes: int  # this rank's blocks
    cache_bytes: int  # this rank's slots


@dataclass
class WeightPool:
    """Steps, in this order: `own`, exchange `offer` with the peers, `connect` each, `start`.

    `owners`: owner of every layer. Layers are entered and left once per forward pass.
    """

    transport: Transport
    rank: int
    num_ranks: int
    owners: Sequence[int]
    prefetch_order: str
    num_slots: int
    layouts: dict[int, BlockLayout] = field(default_factory=dict)
    _owned: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    _blocks: dict[int, PeerBlock] = field(default_factory=dict)
    _prefetcher: Prefetcher | None = None
    _entered: int | None = None
    _step: CapturedStep | None = None
    _captured: CapturedStep | None = None  # the same, while a step is captured into a CUDA graph

    def owns(self, layer: int) -> bool:
        return self.owners[layer] == self.rank

    def own(self, layouts: Mapping[int, BlockLayout]) -> dict[int, dict[str, torch.Tensor]]:
        """Allocate this rank's blocks; returns layer → name → view, to be filled by the caller."""
        self.layouts.update(layouts)
        memory = self.transport.allocate(sum(layout.num_bytes for layout in layouts.values()))
        for layer, offset in _offsets(layouts).items():
            block = memory[offset : offset + layouts[layer].num_bytes]
            self._owned[layer] = layouts[layer].views(block)
        return self._owned

    def offer(self) -> dict[str, Any]:
        """What peers must know, as JSON values; the file descriptors travel beside it."""
        return {str(layer): self.layouts[layer].as_dict() for layer in self._owned}

    def connect(self, owner: int, offer: Mapping[str, Any], file_descriptors: list[int]) -> None:
        """Take over what `owner` offered."""
        layouts = {int(layer): BlockLayout.from_dict(values) for layer, values in offer.items()}
        memory = self.transport.connect(owner, file_descriptors)
        for layer, offset in _offsets(layouts).items():
            self.layouts[layer] = layouts[layer]
            data = memory[offset : offset + layouts[layer].num_bytes]
            self._blocks[layer] = PeerBlock(owner, data)

    def start(self) -> dict[int, dict[str, torch.Tensor]]:
        """Make the slots and begin to fetch; returns layer → name → view of its slot."""
        schedule = make_schedule(
            self.owners, self.rank, self.num_ranks, self.prefetch_order, self.num_slots
        )
        self._prefetcher = Prefetcher(
            self.transport,
            schedule,
            self._blocks,
            max((self.layouts[layer].num_bytes for layer in schedule.order), default=0),
            ticketed=self.prefetch_order == "ticketed",
        )
        views = {
            layer: self.layouts[layer].views(self._prefetcher.slot_of(layer).memory)
            for layer in schedule.order
        }
        self._prefetcher.start()
        return views

    @property
    def is_started(self) -> bool:
        return self._prefetcher is not None

    @property
    def prefetcher(self) -> Prefetcher:
        assert self._prefetcher is not None, "the pool has not been started"
        return self._prefetcher

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a forward pass that may be captured; without it a pass can't be."""
        if self._step is None:  # in a warm-up run, before anything is captured
            self._step = self.prefetcher.capture()
        if not self.transport.is_capturing():
            yield
            return
        self._captured = self._step
        self._captured.begin()
        try:
            yield
            self._captured.end()
        finally:
            self._captured = None

    def begin_replay(self) -> None:
        """A captured step is about to be launched on the compute stream."""
        self._entered = None  # by a step that was cut short
        self.prefetcher.begin_replay()

    def enter(self, layer: int) -> None:
        """The forward pass is about to use units of `layer`; may be called for each of them."""
        if not self.owns(layer) and self._entered != layer:
            (self._captured or self.prefetcher).acquire(layer)
        self._entered = layer

    def leave(self, layer: int, *, keep: bool = False) -> None:
        """The forward pass is through with the last unit of `layer`, which may `keep` its slot."""
        if not self.owns(layer) and not keep:
            (self._captured or self.prefetcher).release(layer)
        self._entered = None

    def holds(self, layer: int) -> bool:
        """Whether the weights of `layer` are here, or on their way into its slot."""
        return self.owns(layer) or self.prefetcher.slot_of(layer).layer == layer

    def bytes(self) -> PoolBytes:
        return PoolBytes(
            pooled_bytes=sum(layout.num_bytes for layout in self.layouts.values()),
            owned_bytes=sum(self.layouts[layer].num_bytes for layer in self._owned),
            cache_bytes=sum(slot.memory.numel() for slot in self.prefetcher.slots),
        )

    def close(self) -> None:
        self.transport.close()


def _offsets(layouts: Mapping[int, BlockLayout]) -> dict[int, int]:
    """Offset of every layer's block in its owner's memory, in bytes."""
    offsets, offset = {}, 0
    for layer in sorted(layouts):
        offsets[layer] = offset
        offset += layouts[layer].num_bytes
    return offsets

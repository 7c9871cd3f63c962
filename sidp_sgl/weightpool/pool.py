"""One rank's share of the pooled weights: its stripes of the blocks, slots for the others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch

from sidp_sgl.weightpool.layout import BlockLayout
from sidp_sgl.weightpool.placement import Placement, Stripe
from sidp_sgl.weightpool.schedule import make_schedule
from sidp_sgl.weightpool.self_check.checksum import checksum
from sidp_sgl.weightpool.transport.interface import PeerStripe, Transport
from sidp_sgl.weightpool.was.captured import CapturedStep
from sidp_sgl.weightpool.was.prefetch import Prefetcher

OnMove = Callable[[int, dict[str, torch.Tensor]], object]


@dataclass
class WeightPool:
    """Steps, in this order: `add_block` each unless `placement` has them, `own`, exchange `offer`
    with the peers, `connect` each, `start`. From then on blocks are entered and left in order.

    `takes_turns`: whether an owner serves one reader at a time. `has_checksums`: whether offers
    have those of their stripes. `on_move`: told where a block's tensors lie from now on.
    """

    transport: Transport
    rank: int
    placement: Placement
    order: str = "sequential"
    takes_turns: bool = True
    has_checksums: bool = True
    on_move: OnMove = lambda block, views: None
    layouts: dict[int, BlockLayout] = field(default_factory=dict)
    _stripes: dict[int, list[PeerStripe]] = field(default_factory=dict)  # of each block, in order
    _prefetcher: Prefetcher | None = None
    _whole: frozenset[int] = frozenset()  # blocks that are all here
    _entered: int | None = None
    _step: CapturedStep | None = None
    _captured: CapturedStep | None = None  # the same, while a step is captured into a CUDA graph

    def add_block(self, num_bytes: int, layer: int | None, *, is_fetched: bool = True) -> int:
        """The next block of the forward pass, as `Placement.with_block`; returns its index."""
        self.placement = self.placement.with_block(num_bytes, layer, is_fetched=is_fetched)
        return len(self.placement.blocks) - 1

    def owns(self, block: int) -> bool:
        return self.placement.owns(self.rank, block)

    def owners(self, block: int) -> tuple[int, ...]:
        """Of every stripe."""
        return self.placement.owners(block)

    def own(self, layouts: Mapping[int, BlockLayout]) -> dict[int, torch.Tensor]:
        """Allocate this rank's stripes of the blocks that it holds part of.

        Returns block → its bytes here ([num_bytes] uint8, all of the block's or one stripe after
        the other), to be filled by the caller.
        """
        self.layouts.update(layouts)
        for block, layout in layouts.items():
            self._fit(block, layout)
        memory = self.transport.allocate(self.placement.owned_bytes(self.rank))
        owned = {}
        for block, (start, stripes) in self._offsets_of(self.rank).items():
            owned[block] = memory[start : start + sum(stripe.num_bytes for stripe in stripes)]
            self._add_stripes(block, self.rank, memory[start:], stripes)
        return owned

    def _fit(self, block: int, layout: BlockLayout) -> None:
        """A whole block may have changed its size since it was placed, while it was loaded."""
        if len(stripes := self.placement.blocks[block]) == 1:
            whole = replace(stripes[0], num_bytes=layout.num_bytes)
            self.placement = self.placement.with_stripes(block, [whole])

    def _offsets_of(self, owner: int) -> dict[int, tuple[int, list[Stripe]]]:
        """Of the blocks that `owner` holds part of: where in its memory its stripes begin."""
        offsets, offset = {}, 0
        for block in self.placement.owned(owner):
            stripes = [s for s in self.placement.blocks[block] if s.owner == owner]
            offsets[block] = offset, stripes
            offset += sum(stripe.num_bytes for stripe in stripes)
        return offsets

    def _add_stripes(
        self,
        block: int,
        owner: int,
        memory: torch.Tensor,
        stripes: list[Stripe],
        checksums: Sequence[int] = (),
    ) -> None:
        """`stripes` of `block` lie one after the other in `memory` of `owner`."""
        known, start = self._stripes.setdefault(block, []), 0
        for stripe, expected in zip_longest(stripes, checksums):
            data = memory[start : start + stripe.num_bytes]
            known.append(PeerStripe(owner, data, stripe.offset, expected))
            start += stripe.num_bytes
        known.sort(key=lambda stripe: stripe.offset)

    def offer(self) -> dict[str, Any]:
        """What peers must know, as JSON values; the file descriptors travel beside it."""
        return {
            str(block): {"layout": self.layouts[block].as_dict(), "checksums": self._sums(block)}
            for block in self.placement.owned(self.rank)
        }

    def _sums(self, block: int) -> list[int]:
        """Of this rank's stripes of a block, in order."""
        own = [stripe.data for stripe in self._stripes[block] if stripe.owner == self.rank]
        return [int(checksum(data)) for data in own] if self.has_checksums else []

    def connect(self, owner: int, offer: Mapping[str, Any], file_descriptors: list[int]) -> None:
        """Take over what `owner` offered."""
        for block, values in offer.items():
            layout = BlockLayout.from_dict(values["layout"])
            self.layouts[int(block)] = layout
            self._fit(int(block), layout)
        memory = self.transport.connect(owner, file_descriptors)
        for block_id, (start, stripes) in self._offsets_of(owner).items():
            checksums = offer[str(block_id)]["checksums"]
            self._add_stripes(block_id, owner, memory[start:], stripes, checksums)

    def stripes(self, block: int) -> list[PeerStripe]:
        """In the order of their places."""
        return self._stripes[block]

    def owner_views(self, block: int) -> dict[str, torch.Tensor]:
        """Name → view of a block where its owner has it; not to be written."""
        (stripe,) = self._stripes[block]
        return self.layouts[block].views(stripe.data)

    def start(self) -> dict[int, dict[str, torch.Tensor]]:
        """Make the slots and begin to fetch; returns block → name → view of its slot."""
        schedule = make_schedule(self.placement, self.rank, self.order)
        self._whole = frozenset(range(len(self.placement.blocks))) - set(schedule.order)
        self._prefetcher = Prefetcher(
            self.transport,
            schedule,
            {block: self._stripes[block] for block in schedule.order},
            self.placement.slot_bytes(self.rank),
            rank=self.rank,
            takes_turns=self.takes_turns,
        )
        views = {
            block: self.layouts[block].views(self._prefetcher.slot_of(block).memory)
            for block in schedule.order
        }
        self._prefetcher.start()
        return views

    def keep(self, block: int, memory: torch.Tensor) -> None:
        """Between two steps: let a fetched block stay in `memory`, which is lent."""
        self._entered = None
        self.prefetcher.keep(block, memory)
        self.on_move(block, self.layouts[block].views(memory))

    def drop(self, block: int) -> None:
        """Between two steps: what is enqueued from here on may write to the memory of a block that
        was kept."""
        self._entered = None
        self.prefetcher.drop(block)
        self.on_move(block, self.layouts[block].views(self.prefetcher.slot_of(block).memory))

    def passing(self) -> list[int]:
        """Fetched blocks that don't stay, in the order of their fetches."""
        prefetcher = self.prefetcher
        return [block for block in prefetcher.order if block not in prefetcher.residents]

    @property
    def is_local(self) -> bool:
        """Whether all weights are here for now, so that a step is one of plain data parallelism."""
        residents = self.prefetcher.residents
        return 0 < len(residents) == len(self.prefetcher.order) and not residents.num_fetching

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

    def enter(self, block: int) -> None:
        """The forward pass is about to use units of `block`; may be called for each of them."""
        if block not in self._whole and self._entered != block:
            (self._captured or self.prefetcher).acquire(block)
        self._entered = block

    def leave(self, block: int, *, keep: bool = False) -> None:
        """The forward pass is through with the last unit of `block`, which may `keep` its slot."""
        if block not in self._whole and not keep:
            (self._captured or self.prefetcher).release(block)
        self._entered = None

    def holds(self, block: int) -> bool:
        """Whether the weights of `block` are here, or on their way into its slot."""
        return block in self._whole or self.prefetcher.holds(block)

    def close(self) -> None:
        self.transport.close()

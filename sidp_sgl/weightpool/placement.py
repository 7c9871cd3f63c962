"""Who owns which block, what a rank fetches, what that frees: the arithmetic of owners and slots.

Pure. A block is named by its index in the order of the forward pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

DEFAULT_SLOTS = 3
EXPERT_SLOTS = 2  # where layers are mixtures: their blocks are large, and decoded by their owners


@dataclass(frozen=True)
class Stripe:
    """The part of a block that one owner holds: `num_bytes` from byte `offset` of the block on."""

    owner: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Placement:
    """The blocks of one group of `num_ranks`, and the slots of a rank.

    `kind`: `interleaved` gives every block to the rank that owns the fewest bytes so far, which is
    block mod d where all blocks are alike; `contiguous` gives each rank one run of layers, as many
    as the others' or one more, and needs to know `num_layers`. The owner of a block follows from
    its layer and the blocks before it, so that a model can be placed while it is built.
    """

    num_ranks: int
    num_slots: int = DEFAULT_SLOTS  # of a rank; no rank has more of them than blocks to fetch
    kind: str = "interleaved"
    num_layers: int = 0  # that there will be, with any number of blocks each
    blocks: tuple[tuple[Stripe, ...], ...] = ()
    unfetched: frozenset[int] = frozenset()  # blocks that others read where they lie

    @classmethod
    def of(
        cls,
        block_bytes: Iterable[int],
        num_ranks: int,
        num_slots: int | None = None,
        kind: str = "interleaved",
    ) -> "Placement":
        """Of blocks of these sizes, one per layer, each with one stripe."""
        sizes, owned = list(block_bytes), [0] * num_ranks
        stripes = []
        for layer, size in enumerate(sizes):
            owner = _next_owner(kind, layer, len(sizes), owned)
            owned[owner] += size
            stripes.append((Stripe(owner, 0, size),))
        return cls(num_ranks, num_slots or DEFAULT_SLOTS, kind, len(sizes), tuple(stripes))

    def with_block(
        self, num_bytes: int, layer: int | None, *, is_fetched: bool = True
    ) -> "Placement":
        """With one more block at the end of the forward pass, in one stripe. `layer`: that it
        belongs to; None for a block that is no layer's. `is_fetched`: else it is read where it
        lies."""
        owned = [self.owned_bytes(rank) for rank in range(self.num_ranks)]
        owner = _next_owner(self.kind, layer, self.num_layers, owned)
        return replace(
            self,
            blocks=(*self.blocks, (Stripe(owner, 0, num_bytes),)),
            unfetched=self.unfetched | (frozenset() if is_fetched else {len(self.blocks)}),
        )

    def with_stripes(self, block: int, stripes: Iterable[Stripe]) -> "Placement":
        """With other stripes of `block`; they must cover it without a gap, in order."""
        taken, end = tuple(stripes), 0
        for stripe in taken:
            if stripe.offset != end:
                raise ValueError(f"stripes of block {block} leave a gap at byte {end}")
            end += stripe.num_bytes
        return replace(self, blocks=(*self.blocks[:block], taken, *self.blocks[block + 1 :]))

    # Of one block.

    def block_bytes(self, block: int) -> int:
        return sum(stripe.num_bytes for stripe in self.blocks[block])

    def owners(self, block: int) -> tuple[int, ...]:
        """Owner of every stripe."""
        return tuple(stripe.owner for stripe in self.blocks[block])

    def owns(self, rank: int, block: int) -> bool:
        """Whether all of the block is the rank's."""
        return all(stripe.owner == rank for stripe in self.blocks[block])

    # Of one rank. All sizes in bytes.

    def owned(self, rank: int) -> list[int]:
        """Blocks of which the rank holds a stripe."""
        return [block for block in range(len(self.blocks)) if rank in self.owners(block)]

    def fetched(self, rank: int) -> list[int]:
        """Blocks of which the rank lacks a stripe that it needs."""
        return [
            block
            for block in range(len(self.blocks))
            if not self.owns(rank, block) and block not in self.unfetched
        ]

    def asked(self, rank: int) -> list[int]:
        """The other ranks that own something which the rank lacks."""
        return sorted({s.owner for stripes in self.blocks for s in stripes} - {rank})

    def slots(self, rank: int) -> int:
        return min(self.num_slots, len(self.fetched(rank)))

    def keeps_all(self, rank: int) -> bool:
        """Whether every fetched block has a slot of its own: it is fetched once."""
        return self.num_slots >= len(self.fetched(rank))

    def owned_bytes(self, rank: int) -> int:
        return sum(s.num_bytes for stripes in self.blocks for s in stripes if s.owner == rank)

    def slot_bytes(self, rank: int) -> int:
        """Of one slot: it takes any block that the rank fetches."""
        return max((self.block_bytes(block) for block in self.fetched(rank)), default=0)

    def cache_bytes(self, rank: int) -> int:
        """Of all slots."""
        return self.slots(rank) * self.slot_bytes(rank)

    def freed_bytes(self, rank: int) -> int:
        """Memory beside the weights that the rank has more than a full replica; may be below 0."""
        return self.pooled_bytes - self.owned_bytes(rank) - self.cache_bytes(rank)

    # Of the group.

    @property
    def num_stripes(self) -> int:
        """Of the block that has most of them."""
        return max(map(len, self.blocks), default=0)

    @property
    def pooled_bytes(self) -> int:
        return sum(stripe.num_bytes for stripes in self.blocks for stripe in stripes)

    @property
    def most_slots(self) -> int:
        """What the rank with the most blocks to fetch can use."""
        return max(len(self.fetched(rank)) for rank in range(self.num_ranks))


def _next_owner(kind: str, layer: int | None, num_layers: int, owned_bytes: list[int]) -> int:
    """Owner of the next block, in `layer`; `owned_bytes` of every rank so far."""
    if kind == "interleaved" or layer is None:
        return owned_bytes.index(min(owned_bytes))
    if kind == "contiguous":
        shorter, num_longer = divmod(num_layers, len(owned_bytes))
        boundary = num_longer * (shorter + 1)
        if layer < boundary:
            return layer // (shorter + 1)
        return num_longer + (layer - boundary) // max(shorter, 1)
    raise ValueError(f"unknown placement {kind!r}")

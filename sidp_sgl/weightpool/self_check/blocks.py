"""The blocks of other ranks, compared with their owners' checksums the way they come here: fetched
by the pool, eagerly or in a CUDA graph, or read where they lie.

A slot is poisoned when its block has been summed, so that a fetch that is missing, late, early or
torn shows in the next sum. Nothing waits for another rank, and nothing for the device but the end.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sidp_sgl.errors import SidpError
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.self_check.checksum import checksum
from sidp_sgl.weightpool.transport.interface import PeerStripe

POISON = 0xA5  # small numbers in every floating-point format
_REPLAYS = 2  # the second begins with what the first has fetched
EAGER, CAPTURED = "fetched into its slot", "fetched into its slot by a CUDA graph"
IN_PLACE, RUNNING = "read where it lies", "as it lies here while running"


@dataclass(frozen=True)
class Fault:
    """A stripe that came with other bytes than its owner has."""

    block: int
    owner: int
    path: str


@dataclass(frozen=True)
class _Expected:
    """A stripe of another rank; its place in the device's counts."""

    index: int
    block: int
    stripe: PeerStripe


class BlockCheck:
    """Of a started pool whose peers have offered checksums."""

    def __init__(self, pool: WeightPool) -> None:
        self._pool = pool
        foreign = [
            (block, stripe)
            for block in range(len(pool.placement.blocks))
            for stripe in pool.stripes(block)
            if stripe.owner != pool.rank
        ]
        self._all = [_Expected(index, *found) for index, found in enumerate(foreign)]
        self._of: dict[int, list[_Expected]] = defaultdict(list)  # by block
        for each in self._all:
            self._of[each.block].append(each)
        self._fetched = pool.placement.fetched(pool.rank)
        sums = [each.stripe.checksum for each in self._all]
        assert None not in sums, "the peers have offered no checksums"
        empty = pool.transport.empty
        self._expected = empty(8 * len(sums)).view(torch.int64)
        self._expected.copy_(torch.tensor(sums, dtype=torch.int64))
        self._wrong = empty(8 * len(sums)).view(torch.int64).zero_()
        pool.transport.synchronize()

    @property
    def num_bytes(self) -> int:
        """Of all that is compared in one pass over fetched blocks and those that stay in place."""
        return sum(each.stripe.data.numel() for each in self._all)

    @property
    def num_blocks(self) -> int:
        return len(self._of)

    def fetch(self, visit: Callable[[int], None] = lambda block: None) -> list[Fault]:
        """Every block through its slot. `visit`: called while the block is there, for work that the
        compute stream does with it."""
        self._pool.transport.synchronize()
        self._pass(visit)
        return self._faults(EAGER)

    def fetch_captured(self) -> list[Fault]:
        """The same as a CUDA graph, which is replayed."""
        transport = self._pool.transport
        transport.synchronize()
        replay = transport.captured(self._step)
        for _ in range(_REPLAYS):
            self._pool.begin_replay()
            for slot in self._pool.prefetcher.slots:
                if slot.block is None:
                    self._poison(slot.memory)
            replay()
        return self._faults(CAPTURED)

    def read_in_place(self) -> list[Fault]:
        """Blocks that are never fetched."""
        for block in self._pool.placement.unfetched:
            for each in self._of.get(block, ()):
                self._compare(each, each.stripe.data)
        return self._faults(IN_PLACE)

    def look(self, number: int) -> list[Fault]:
        """One block that lies in its slot now, another one each time. Between two steps."""
        self._pool.transport.synchronize()  # whatever stream the latest step was on
        prefetcher = self._pool.prefetcher
        held = [block for block in prefetcher.order if prefetcher.holds(block)]
        if not held:
            return []
        block = held[number % len(held)]
        self._pool.enter(block)
        self._compare_block(block)
        return self._faults(RUNNING)

    def _step(self) -> None:
        with self._pool.step():
            self._pass(lambda block: None)

    def _pass(self, visit: Callable[[int], None]) -> None:
        for block in self._fetched:
            self._pool.enter(block)
            self._compare_block(block)
            visit(block)
            if not self._pool.prefetcher.keeps_all:
                self._poison(self._pool.prefetcher.slot_of(block).memory)
            self._pool.leave(block)

    def _compare_block(self, block: int) -> None:
        memory = self._pool.prefetcher.memory_of(block)
        for each in self._of[block]:
            start = each.stripe.offset
            self._compare(each, memory[start : start + each.stripe.data.numel()])

    def _compare(self, each: _Expected, memory: torch.Tensor) -> None:
        wrong, expected = (t[each.index] for t in (self._wrong, self._expected))

        def compare() -> None:
            wrong.add_(checksum(memory) != expected)

        self._pool.transport.compute_stream.launch(compare)

    def _poison(self, memory: torch.Tensor) -> None:
        self._pool.transport.compute_stream.launch(lambda: memory.fill_(POISON))

    def _faults(self, path: str) -> list[Fault]:
        self._pool.transport.synchronize()
        counts = self._wrong.tolist()
        self._wrong.zero_()
        return [
            Fault(each.block, each.stripe.owner, path) for each in self._all if counts[each.index]
        ]


def raise_first(faults: list[Fault], rank: int) -> None:
    """Raise SidpError in one line, where there are any."""
    if not faults:
        return
    first, others = faults[0], len(faults) - 1
    raise SidpError(
        f"--sidp-self-check: block {first.block} of DP rank {first.owner} has other bytes at DP "
        f"rank {rank} than at its owner ({first.path}"
        f"{f'; {others} more' if others else ''}): this machine's data can't be trusted, start "
        "without --sidp and report it"
    )

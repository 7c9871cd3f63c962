"""A group of weight pools in one process: ranks as threads, over real transports."""

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from sidp_sgl.scheduler.lifecycle.rendezvous import Offer, exchange
from sidp_sgl.scheduler.member import Member
from sidp_sgl.weightpool.layout import make_layout
from sidp_sgl.weightpool.placement import Placement, Stripe
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.schedule import FetchSchedule, make_schedule, shifted_slots
from sidp_sgl.weightpool.transport.interface import Transport
from sidp_sgl.weightpool.transport.shm.transport import ShmTransport
from sidp_sgl.weightpool.was.counters import FetchCounters

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Group:
    """What is pooled, and how; `num_slots` None takes the default."""

    num_ranks: int
    num_layers: int  # of one block each
    order: str = "sequential"
    kind: str = "interleaved"
    num_slots: int | None = None
    turns: bool = True
    stripes: bool = False  # whether every rank owns a part of every block
    unfetched: frozenset[int] = frozenset()  # blocks that are read where they lie

    def placement(self) -> Placement:
        sizes = [layer_bytes(layer) for layer in range(self.num_layers)]
        placement = Placement.of(sizes, self.num_ranks, self.num_slots, self.kind)
        if self.order == "shifted" and self.num_slots is None:
            placement = replace(placement, num_slots=max(1, shifted_slots(placement)))
        for block, size in enumerate(sizes if self.stripes else []):
            placement = placement.with_stripes(block, even_stripes(size, self.num_ranks))
        return replace(placement, unfetched=self.unfetched)

    def owners(self) -> list[int]:
        return [owners[0] for owners in map(self.placement().owners, range(self.num_layers))]

    def schedule(self, rank: int) -> FetchSchedule:
        return make_schedule(self.placement(), rank, self.order)


def even_stripes(num_bytes: int, num_ranks: int) -> list[Stripe]:
    """A block in as many parts as there are ranks."""
    ends = [num_bytes * (n + 1) // num_ranks for n in range(num_ranks)]
    starts = [0, *ends[:-1]]
    return [Stripe(n, starts[n], ends[n] - starts[n]) for n in range(num_ranks)]


def layer_tensors(layer: int) -> Tensors:
    """A layer's weights: every layer's differ in values and size; one is transposed."""
    generator = torch.Generator().manual_seed(layer)
    return {
        "up.weight": torch.randn(6, 5 + layer % 3, generator=generator).t(),
        "down.weight": torch.randn(40, 8, generator=generator).to(torch.bfloat16),
        "down.bias": torch.randint(0, 255, (9,), generator=generator, dtype=torch.uint8),
    }


def layer_bytes(layer: int) -> int:
    return make_layout(layer_tensors(layer).items()).num_bytes


@dataclass
class RankUnderTest:
    """One rank's pool; `wrong` collects (step, layer) wherever the bytes were not the layer's."""

    pool: WeightPool
    views: dict[int, Tensors]  # every layer: own blocks and slots
    expected: dict[int, Tensors]
    wrong: list[tuple[int, int]] = field(default_factory=list)
    step: int = 0

    def enter(self, layer: int) -> None:
        """Wait for the layer and read it, as a unit's forward pass does."""
        self.pool.enter(layer)
        step, views = self.step, self.views[layer]
        self._launch(lambda: self._check(step, layer, views))

    def leave(self, layer: int) -> None:
        self.pool.leave(layer)

    def run_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for layer in range(len(self.views)):
                self.enter(layer)
                self.leave(layer)
            self.step += 1

    def _launch(self, kernel: Callable[[], None]) -> None:
        self.pool.transport.compute_stream.launch(kernel)

    def _check(self, step: int, layer: int, views: Tensors) -> None:
        for name, tensor in self.expected[layer].items():
            if not torch.equal(views[name], tensor):
                self.wrong.append((step, layer))
                return


class Result:
    """What is left of a rank when its script has ended."""

    def __init__(self, rank: RankUnderTest) -> None:
        self.wrong = list(rank.wrong)
        self.counters: FetchCounters = rank.pool.prefetcher.counters
        self.placement = rank.pool.placement
        self.cache_bytes = sum(slot.memory.numel() for slot in rank.pool.prefetcher.slots)


def run_group(
    group: Group,
    script: Callable[[RankUnderTest], None],
    make_transport: Callable[[int], Transport] = lambda rank: ShmTransport(),
    seconds: float = 60.0,
) -> list[Result]:
    """Run `script` on every rank; raises what a rank raised, AssertionError where one hangs."""
    name = uuid.uuid4().hex
    expected = {layer: layer_tensors(layer) for layer in range(group.num_layers)}
    results: dict[int, Result] = {}
    failures: list[BaseException] = []

    def run(number: int) -> None:
        transport = make_transport(number)
        try:
            own: dict[int, torch.Tensor] = {}
            pool = _connected_pool(group, number, name, transport, expected, own)
            rank = RankUnderTest(pool, _start(pool, own), expected)
            pool.on_move = rank.views.__setitem__
            assert set(rank.views) == set(expected)
            script(rank)
            synchronize = getattr(transport.compute_stream, "synchronize", None)
            if synchronize is not None:
                synchronize()
            results[number] = Result(rank)
        except BaseException as failure:
            failures.append(failure)
        finally:
            transport.close()

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(group.num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    if failures:
        raise failures[0]
    assert len(results) == group.num_ranks, f"ranks hang: only {sorted(results)} have ended"
    return [results[number] for number in range(group.num_ranks)]


def _connected_pool(
    group: Group,
    rank: int,
    name: str,
    transport: Transport,
    expected: dict[int, Tensors],
    own: dict[int, torch.Tensor],
) -> WeightPool:
    """`own` becomes layer → what this rank holds of it."""
    pool = WeightPool(transport, rank, group.placement(), group.order, takes_turns=group.turns)
    held = pool.placement.owned(rank)
    layouts = {layer: make_layout(expected[layer].items()) for layer in held}
    for layer, memory in pool.own(layouts).items():
        whole = torch.empty(layouts[layer].num_bytes, dtype=torch.uint8)
        for tensor_name, view in layouts[layer].views(whole).items():
            view.copy_(expected[layer][tensor_name])
        parts = [s for s in pool.placement.blocks[layer] if s.owner == rank]
        memory.copy_(torch.cat([whole[s.offset : s.offset + s.num_bytes] for s in parts]))
        own[layer] = memory
    offer = Offer(Member(rank), {}, pool.offer(), transport.export())
    for other, its_offer in exchange(name, offer, group.num_ranks, timeout=30.0).items():
        pool.connect(other, its_offer.content, its_offer.file_descriptors)
    return pool


def _start(pool: WeightPool, own: dict[int, torch.Tensor]) -> dict[int, Tensors]:
    """Every layer's views: own blocks and slots."""
    whole = {layer: own[layer] for layer in own if pool.owns(layer)}
    views = {layer: pool.layouts[layer].views(memory) for layer, memory in whole.items()}
    views.update(pool.start())
    for layer in pool.placement.unfetched - set(views):
        views[layer] = pool.owner_views(layer)
    return views

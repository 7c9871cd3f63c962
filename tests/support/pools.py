"""A group of weight pools in one process: ranks as threads, over real transports."""

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sidp_sgl.scheduler.lifecycle.rendezvous import Offer, exchange
from sidp_sgl.scheduler.member import Member
from sidp_sgl.weightpool.layout import make_layout
from sidp_sgl.weightpool.placement import owners
from sidp_sgl.weightpool.pool import PoolBytes, WeightPool
from sidp_sgl.weightpool.schedule import FetchSchedule, default_slots, make_schedule
from sidp_sgl.weightpool.transport.interface import Transport
from sidp_sgl.weightpool.transport.shm.transport import ShmTransport
from sidp_sgl.weightpool.was.prefetch import FetchCounters

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Group:
    """What is pooled, and how; `num_slots` None takes the default."""

    num_ranks: int
    num_layers: int
    order: str = "ticketed"
    placement: str = "interleaved"
    num_slots: int | None = None

    def owners(self) -> list[int]:
        return owners(self.num_layers, self.num_ranks, self.placement)

    def slots(self) -> int:
        return self.num_slots or default_slots(self.owners(), self.num_ranks, self.order)

    def schedule(self, rank: int) -> FetchSchedule:
        return make_schedule(self.owners(), rank, self.num_ranks, self.order, self.slots())


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
        step = self.step
        self._launch(lambda: self._check(step, layer))

    def leave(self, layer: int) -> None:
        self.pool.leave(layer)

    def run_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for layer in range(len(self.views)):
                self.enter(layer)
                self.leave(layer)
            self.step += 1

    def _launch(self, kernel: Callable[[], None]) -> None:
        launch: Any = getattr(self.pool.transport.compute_stream, "launch", None)
        if launch is None:
            kernel()
        else:
            launch(kernel)

    def _check(self, step: int, layer: int) -> None:
        for name, tensor in self.expected[layer].items():
            if not torch.equal(self.views[layer][name], tensor):
                self.wrong.append((step, layer))
                return


class Result:
    """What is left of a rank when its script has ended."""

    def __init__(self, rank: RankUnderTest) -> None:
        self.wrong = list(rank.wrong)
        self.counters: FetchCounters = rank.pool.prefetcher.counters
        self.sizes: PoolBytes = rank.pool.bytes()


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
            pool = _connected_pool(group, number, name, transport, expected)
            rank = RankUnderTest(pool, _start(pool, expected), expected)
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
    group: Group, rank: int, name: str, transport: Transport, expected: dict[int, Tensors]
) -> WeightPool:
    pool = WeightPool(transport, rank, group.num_ranks, group.owners(), group.order, group.slots())
    own = {n: tensors for n, tensors in expected.items() if pool.owns(n)}
    blocks = pool.own({layer: make_layout(tensors.items()) for layer, tensors in own.items()})
    for layer, tensors in own.items():
        for tensor_name, tensor in tensors.items():
            blocks[layer][tensor_name].copy_(tensor)
    offer = Offer(Member(rank), {}, pool.offer(), transport.export())
    for other, its_offer in exchange(name, offer, group.num_ranks, timeout=30.0).items():
        pool.connect(other, its_offer.content, its_offer.file_descriptors)
    return pool


def _start(pool: WeightPool, expected: dict[int, Tensors]) -> dict[int, Tensors]:
    views = {**pool._owned, **pool.start()}
    assert set(views) == set(expected)
    return views

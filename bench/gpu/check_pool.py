"""The pool on the GPU: every use of every layer sees its bytes, eagerly and in replayed graphs."""

from typing import Any

import torch

from bench.gpu.device import Gpu
from bench.gpu.ranks import Rank, run_ranks
from sidp_sgl.weightpool.layout import make_layout
from sidp_sgl.weightpool.placement import owners
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.schedule import default_slots
from sidp_sgl.weightpool.transport.cuda.transport import CudaTransport

LAYERS, STEPS, REPLAYS = 9, 8, 1000
_ELEMENTS = 4 << 20  # bf16, of a layer; each layer has a few more


def layer_weight(gpu: Gpu, layer: int) -> torch.Tensor:
    """[elements] bf16, the same on every rank; sizes and values differ between layers."""
    size = int(_ELEMENTS * gpu.scale) + 128 * layer
    return (torch.arange(size, device=gpu.device) * (2 * layer + 3) % 509).to(torch.bfloat16)


class CheckedPool:
    """One rank's pool, and a count of the uses that saw wrong bytes, kept on the device."""

    def __init__(self, rank: Rank, gpu: Gpu, order: str) -> None:
        layer_owners = owners(LAYERS, rank.num_ranks, "interleaved")
        slots = default_slots(layer_owners, rank.num_ranks, order)
        transport = CudaTransport(gpu.driver)
        self.gpu = gpu
        self.pool = WeightPool(transport, rank.number, rank.num_ranks, layer_owners, order, slots)
        self.expected = [layer_weight(gpu, layer) for layer in range(LAYERS)]
        layouts = {
            layer: make_layout([("w", self.expected[layer])])
            for layer in range(LAYERS)
            if self.pool.owns(layer)
        }
        self.blocks = self.pool.own(layouts)
        for layer, block in self.blocks.items():
            block["w"].copy_(self.expected[layer])
        offers = rank.exchange(self.pool.offer(), transport.export())
        for peer, (offer, descriptors) in offers.items():
            self.pool.connect(peer, offer, descriptors)
        rank.barrier()
        self.views = {**self.blocks, **self.pool.start()}
        self.wrong = torch.zeros(1, dtype=torch.int64, device=gpu.device)

    def step(self) -> None:
        """A forward pass: nothing in it waits for the device."""
        with self.pool.step():
            for layer in range(LAYERS):
                self.pool.enter(layer)
                self.gpu.launch(lambda layer=layer: self._compare(layer))
                self.pool.leave(layer)

    def _compare(self, layer: int) -> None:
        self.wrong += (self.views[layer]["w"] != self.expected[layer]).any()

    def poison(self, *, held: bool = False) -> None:
        """Overwrite the slots that the next replay has to fill, or those that it relies on."""
        for slot in self.pool.prefetcher.slots:
            if (slot.layer is not None) == held:
                self.gpu.launch(lambda slot=slot: slot.memory.fill_(77))

    def close(self, rank: Rank) -> dict[str, Any]:
        self.gpu.synchronize()
        counters, transport = self.pool.prefetcher.counters, self.pool.transport
        assert isinstance(transport, CudaTransport)
        result = {
            "wrong": int(self.wrong),
            "fetches": counters.fetches,
            "resyncs": counters.resyncs,
            "skipped_turns": transport.skipped_turns(),
        }
        rank.barrier()  # nobody reads this rank's blocks any more
        transport.close()
        return result


def _eager(rank: Rank, gpu: Gpu, order: str) -> dict[str, Any]:
    checked = CheckedPool(rank, gpu, order)
    for _ in range(STEPS):
        checked.step()
    return checked.close(rank)


def eager(gpu: Gpu) -> dict[str, Any]:
    """Three ranks, every order of fetches, some steps each."""
    result: dict[str, Any] = {}
    for order in ("sequential", "shifted", "ticketed"):
        ranks = run_ranks(gpu, 3, _eager, order)
        result[order] = {name: [rank[name] for rank in ranks] for name in ranks[0]}
    result["ok"] = all(not any(values["wrong"]) for values in result.values())
    return result


def _graphs(rank: Rank, gpu: Gpu, order: str, replays: int) -> dict[str, Any]:
    checked = CheckedPool(rank, gpu, order)
    checked.step()
    replay = gpu.capture(checked.step)
    for number in range(replays):
        checked.pool.begin_replay()
        checked.poison()
        replay()
        if number % 50 == 49:
            checked.step()  # as a prefill between decode steps
    gpu.synchronize()
    wrong_before = int(checked.wrong)
    checked.pool.begin_replay()
    checked.poison(held=True)
    replay()
    gpu.synchronize()
    is_seen = int(checked.wrong) > wrong_before
    checked.wrong.fill_(wrong_before)
    return {**checked.close(rank), "poison_is_seen": is_seen}


def graphs(gpu: Gpu) -> dict[str, Any]:
    """Two ranks replay captured steps, slots poisoned before each; eager steps in between."""
    result: dict[str, Any] = {}
    replays = max(20, int(REPLAYS * gpu.scale))
    for order, number in (("sequential", replays), ("ticketed", replays // 10)):
        ranks = run_ranks(gpu, 2, _graphs, order, number, seconds=90.0)
        result[order] = {name: [rank[name] for rank in ranks] for name in ranks[0]}
        result[order]["replays"] = number
    result["ok"] = all(
        not any(values["wrong"]) and all(values["poison_is_seen"]) for values in result.values()
    )
    return result

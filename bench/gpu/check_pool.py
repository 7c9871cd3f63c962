"""The pool on the GPU: every use of every layer sees its bytes, eagerly and in replayed graphs."""

from dataclasses import replace
from typing import Any

import torch

from bench.gpu.device import Gpu
from bench.gpu.ranks import Rank, run_ranks
from sidp_sgl.weightpool.layout import make_layout
from sidp_sgl.weightpool.placement import Placement
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.schedule import shifted_slots
from sidp_sgl.weightpool.self_check.blocks import BlockCheck
from sidp_sgl.weightpool.transport.cuda.transport import CudaTransport

LAYERS, STEPS, REPLAYS = 9, 8, 1000
_ELEMENTS = 4 << 20  # bf16, of a layer; each layer has a few more


def layer_weight(gpu: Gpu, layer: int) -> torch.Tensor:
    """[elements] bf16, the same on every rank; sizes and values differ between layers."""
    size = int(_ELEMENTS * gpu.scale) + 128 * layer
    return (torch.arange(size, device=gpu.device) * (2 * layer + 3) % 509).to(torch.bfloat16)


class CheckedPool:
    """One rank's pool, and a count of the uses that saw wrong bytes, kept on the device."""

    def __init__(self, rank: Rank, gpu: Gpu, order: str, turns: bool) -> None:
        expected = [layer_weight(gpu, layer) for layer in range(LAYERS)]
        layouts = [make_layout([("w", weight)]) for weight in expected]
        placement = Placement.of((layout.num_bytes for layout in layouts), rank.num_ranks)
        if order == "shifted":
            placement = replace(placement, num_slots=shifted_slots(placement))
        transport = CudaTransport(gpu.driver)
        self.gpu = gpu
        self.pool = WeightPool(transport, rank.number, placement, order, takes_turns=turns)
        self.expected = expected
        own = {block: layouts[block] for block in placement.owned(rank.number)}
        self.views = {
            block: own[block].views(memory) for block, memory in self.pool.own(own).items()
        }
        for block, views in self.views.items():
            views["w"].copy_(expected[block])
        offers = rank.exchange(self.pool.offer(), transport.export())
        for peer, (offer, descriptors) in offers.items():
            self.pool.connect(peer, offer, descriptors)
        rank.barrier()
        self.views.update(self.pool.start())
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
            if (slot.block is not None) == held:
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


def _eager(rank: Rank, gpu: Gpu, order: str, turns: bool) -> dict[str, Any]:
    checked = CheckedPool(rank, gpu, order, turns)
    for _ in range(STEPS):
        checked.step()
    return checked.close(rank)


def eager(gpu: Gpu) -> dict[str, Any]:
    """Three ranks, every order of fetches, some steps each."""
    result: dict[str, Any] = {}
    for name, order, turns in (
        ("sequential", "sequential", False),
        ("shifted", "shifted", False),
        ("in turns", "sequential", True),
    ):
        ranks = run_ranks(gpu, 3, _eager, order, turns)
        result[name] = {key: [rank[key] for rank in ranks] for key in ranks[0]}
    result["ok"] = all(not any(values["wrong"]) for values in result.values())
    return result


def _graphs(rank: Rank, gpu: Gpu, turns: bool, replays: int) -> dict[str, Any]:
    checked = CheckedPool(rank, gpu, "sequential", turns)
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
    return {**_self_check(checked), **checked.close(rank), "poison_is_seen": is_seen}


def _self_check(checked: CheckedPool) -> dict[str, Any]:
    """As at an engine's start; then with the slots poisoned, as in a fault."""
    check = BlockCheck(checked.pool)
    faults = check.fetch() + check.fetch_captured()
    checked.gpu.synchronize()
    checked.poison(held=True)
    return {"self_check_faults": len(faults), "self_check_sees_poison": bool(check.look(0))}


def graphs(gpu: Gpu) -> dict[str, Any]:
    """Two ranks replay captured steps, slots poisoned before each, eager steps in between; then the
    engine's own self-check."""
    result: dict[str, Any] = {}
    replays = max(20, int(REPLAYS * gpu.scale))
    for name, turns, number in (
        ("sequential", False, replays),
        ("in turns", True, replays // 10),
    ):
        ranks = run_ranks(gpu, 2, _graphs, turns, number, seconds=90.0)
        result[name] = {key: [rank[key] for rank in ranks] for key in ranks[0]}
        result[name]["replays"] = number
    result["ok"] = all(
        not any(values["wrong"] + values["self_check_faults"])
        and all(values["poison_is_seen"] + values["self_check_sees_poison"])
        for values in result.values()
    )
    return result

"""A model's layers pass by while they are built: own tensors are loaded into the rank's blocks,
those of others take no memory until the slots take over, in the form that their owners have."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from sidp_sgl.errors import SidpError
from sidp_sgl.sglang_hooks.model.offloader import PoolOffloader
from sidp_sgl.sglang_hooks.model.units import Unit
from sidp_sgl.weightpool.execution import UnitExecution
from sidp_sgl.weightpool.placement import Placement
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.transport.shm.transport import ShmTransport
from tests.unit.sglang_hooks.model.test_units import Attention, Ffn, module

NUM_LAYERS = 4
OWNERS = [0, 1, 0, 1]


def make_layers(num_layers: int = NUM_LAYERS) -> Iterator[nn.Module]:
    for layer in range(num_layers):
        ffn = Ffn()
        ffn.register_buffer("table", torch.full((3,), float(layer)))
        yield module(self_attn=module(attn=Attention()), mlp=ffn)


class Rank:
    """One rank's model, as SGLang builds and loads it."""

    def __init__(self, number: int, *, loads_in_place: bool) -> None:
        self.pool = WeightPool(
            ShmTransport(), number, Placement(2, num_slots=1, num_layers=NUM_LAYERS)
        )
        self.offloader = PoolOffloader(self.pool, "ffn", self._meet, loads_in_place=loads_in_place)
        self.peers: list[Rank] = []
        self.layers = self.offloader.wrap_modules(make_layers())

    def _meet(self, units: list) -> UnitExecution:
        for peer in self.peers:
            fds = [os.dup(fd) for fd in peer.pool.transport.export()]
            self.pool.connect(peer.pool.rank, peer.pool.offer(), fds)
        return UnitExecution(self.pool)

    def ffn(self, layer: int) -> nn.Module:
        return self.layers[layer].mlp  # type: ignore[return-value]

    def weights(self, layer: int) -> dict[str, nn.Parameter]:
        return dict(self.ffn(layer).named_parameters())

    def owned(self) -> list[int]:
        return [layer for layer in range(NUM_LAYERS) if OWNERS[layer] == self.pool.rank]


@contextmanager
def ranks(*, loads_in_place: bool = True) -> Iterator[list[Rank]]:
    both = [Rank(number, loads_in_place=loads_in_place) for number in range(2)]
    for rank, peer in zip(both, reversed(both), strict=True):
        rank.peers = [peer]
    try:
        yield both
    finally:
        for rank in both:
            rank.pool.close()


def values(layer: int, name: str, shape: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * layer + len(name))
    return torch.randint(-3, 4, shape, generator=generator).float()


def load(rank: Rank) -> None:
    for layer in rank.owned():
        for name, parameter in rank.weights(layer).items():
            parameter.data.copy_(values(layer, name, parameter.shape))


def start(both: list[Rank]) -> None:
    for rank in both:
        rank.offloader.post_init()


def test_own_tensors_are_loaded_into_the_block_and_no_others() -> None:
    with ranks() as both:
        rank = both[0]
        for layer in range(NUM_LAYERS):
            for name, parameter in rank.weights(layer).items():
                assert parameter.shape == dict(Ffn().named_parameters())[name].shape
                assert parameter.is_meta == (OWNERS[layer] != 0)
        before = {n: p.data_ptr() for n, p in rank.weights(2).items()}
        for each in both:
            load(each)
        start(both)
        memory = rank.offloader._memory[2]
        inside = range(memory.data_ptr(), memory.data_ptr() + memory.numel())
        for name, parameter in rank.weights(2).items():
            assert parameter.data_ptr() == before[name] and before[name] in inside
            assert parameter.sidp_pooled  # type: ignore[attr-defined]


def test_every_rank_computes_every_layer() -> None:
    with ranks() as both:
        for rank in both:
            load(rank)
        start(both)
        rows = torch.arange(24).view(3, 8) % 5 - 2.0
        for layer in range(NUM_LAYERS):
            reference = Ffn()
            for name, parameter in reference.named_parameters():
                parameter.data = values(layer, name, parameter.shape)
            expected = reference(rows)
            assert expected.any()
            for rank in both:
                rank.pool.enter(layer)
                assert rank.ffn(layer).table.tolist() == [layer] * 3, "buffers come along"
                assert torch.equal(rank.ffn(layer)(rows), expected)  # leaves the block
        assert all(rank.pool.prefetcher.counters.bytes > 0 for rank in both)
        assert both[0].offloader.unmaterialised == 2 * 3
        assert both[0].offloader.owned_layers() == [0, 2]


def test_what_loading_puts_elsewhere_moves_into_the_block() -> None:
    with ranks() as both:
        for rank in both:
            load(rank)
        loaded = torch.randn(8, 24)
        both[0].weights(0)["down_proj.weight"].data = loaded
        start(both)
        view = both[0].weights(0)["down_proj.weight"]
        assert torch.equal(view, loaded) and view.data_ptr() != loaded.data_ptr()


@pytest.mark.parametrize("changed", [torch.zeros(24, 8), torch.zeros(8, 24).bfloat16()])
def test_a_tensor_of_another_form_is_refused_where_loading_is_in_place(
    changed: torch.Tensor,
) -> None:
    with ranks() as both:
        both[0].weights(0)["down_proj.weight"].data = changed
        with pytest.raises(SidpError, match="has changed its form"):
            both[0].offloader.post_init()


def process(ffn: nn.Module) -> None:
    """As quantised weights are after loading: another shape, layout and dtype, a scale beside it,
    a parameter less, an empty one more."""
    weight = ffn.down_proj.weight
    scale = nn.Parameter(weight.abs().max().reshape(1), requires_grad=False)
    ffn.down_proj.weight = nn.Parameter(weight.to(torch.int8).t(), requires_grad=False)
    ffn.down_proj.register_parameter("weight_scale", scale)
    ffn.down_proj.register_parameter("g_idx", nn.Parameter(torch.empty(0), requires_grad=False))
    ffn.down_proj.register_buffer("codes", torch.arange(5, dtype=torch.uint8))
    del ffn.table


def test_others_take_over_the_form_that_their_owner_has_after_loading() -> None:
    with ranks(loads_in_place=False) as both:
        for rank in both:
            assert all(p.numel() for layer in rank.owned() for p in rank.weights(layer).values())
            load(rank)
            for layer in rank.owned():
                process(rank.ffn(layer))
        expected = {
            layer: dict(both[OWNERS[layer]].ffn(layer).state_dict()) for layer in range(NUM_LAYERS)
        }
        expected = copy.deepcopy(expected)
        for rank in both:  # what post_init does before the ranks meet
            rank.offloader._lay_out()
        for rank in both:
            rank.offloader.post_init()
        for rank in both:
            for layer in range(NUM_LAYERS):
                rank.pool.enter(layer)
                state = rank.ffn(layer).state_dict()
                for name, tensor in expected[layer].items():
                    if tensor.numel():
                        assert torch.equal(state[name], tensor), (layer, name)
                        assert state[name].stride() == tensor.stride()
                        assert state[name].dtype == tensor.dtype
                assert "table" not in state
                rank.pool.leave(layer)


@pytest.mark.parametrize("num_layers", [3, 5])
def test_a_model_with_other_layers_than_its_config_says_is_refused(num_layers: int) -> None:
    transport = ShmTransport()
    pool = WeightPool(transport, 0, Placement(2, num_slots=1, num_layers=NUM_LAYERS))
    offloader = PoolOffloader(pool, "ffn", lambda units: pytest.fail("nobody to meet"))
    with pytest.raises(SidpError, match=f"{num_layers} layers where its config says 4"):
        offloader.wrap_modules(make_layers(num_layers))
    transport.close()


def test_layers_have_any_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """None in the first layer, two in the second, one in the others."""
    monkeypatch.setattr(
        "tests.unit.sglang_hooks.model.test_offloader.make_layers",
        lambda: iter(
            [module(), module(mlp=Ffn(), mlp2=Ffn()), module(mlp=Ffn()), module(mlp=Ffn())]
        ),
    )
    monkeypatch.setattr(
        "sidp_sgl.sglang_hooks.model.offloader.find_blocks",
        lambda layer, index, pool: [[Unit(n, m)] for n, m in layer.named_children()],
    )
    with ranks() as both:
        modules = [[m for layer in rank.layers for m in layer.children()] for rank in both]
        for block in range(4):
            for name, parameter in modules[OWNERS[block]][block].named_parameters():
                parameter.data.copy_(values(block, name, parameter.shape))
        start(both)
        assert [rank.offloader.owned_layers() for rank in both] == [[1, 2], [1, 3]]
        rows = torch.arange(24).view(3, 8) % 5 - 2.0
        for block in range(4):
            outputs = [each[block](rows) for each in modules]
            assert outputs[0].any() and torch.equal(*outputs)


@pytest.mark.parametrize(("kind", "owners"), [("interleaved", "0101"), ("contiguous", "0011")])
def test_blocks_of_a_layer_and_behind_the_last_have_owners(kind: str, owners: str) -> None:
    placement = Placement(2, kind=kind, num_layers=4)
    for layer in (1, 1, 3, 3):
        placement = placement.with_block(8, layer)
    assert "".join(str(placement.owners(block)[0]) for block in range(4)) == owners

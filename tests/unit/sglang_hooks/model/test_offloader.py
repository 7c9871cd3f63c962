"""A model's layers pass by while they are built: own tensors are loaded into the rank's blocks,
those of others take no memory until the slots take over, in the form that their owners have."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
from tests.unit.sglang_hooks.model.test_units import Attention, Ffn, Unquantised, module

NUM_LAYERS = 4
OWNERS = [0, 1, 0, 1]


def make_layers(num_layers: int = NUM_LAYERS) -> Iterator[nn.Module]:
    for layer in range(num_layers):
        ffn = Ffn()
        ffn.register_buffer("table", torch.full((3,), float(layer)))
        yield module(self_attn=module(attn=Attention()), mlp=ffn)


built_layers = make_layers


class Rank:
    """One rank's model, as SGLang builds and loads it."""

    def __init__(self, number: int, *, loads_in_place: bool) -> None:
        self.pool = WeightPool(
            ShmTransport(), number, Placement(2, num_slots=1, num_layers=NUM_LAYERS)
        )
        self.offloader = PoolOffloader(self.pool, "ffn", self._meet, loads_in_place=loads_in_place)
        self.peers: list[Rank] = []
        self.layers = self.offloader.wrap_modules(built_layers())
        self.offloader.before_loading(nn.ModuleList(self.layers))

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


class Quantising(Unquantised):
    """As quantised weights are after loading: another shape, layout and dtype, a scale beside it, a
    parameter less, an empty one more. `makes`: attributes that processing makes besides."""

    def __init__(self, makes: Callable[[nn.Module], dict[str, Any]] = lambda linear: {}) -> None:
        self.makes = makes

    def process_weights_after_loading(self, linear: nn.Module) -> None:
        vars(linear).update(self.makes(linear))
        weight = linear.weight
        scale = nn.Parameter(weight.abs().max().reshape(1), requires_grad=False)
        linear.weight = nn.Parameter(weight.to(torch.int8).t(), requires_grad=False)
        linear.register_parameter("weight_scale", scale)
        linear.register_parameter("g_idx", nn.Parameter(torch.empty(0), requires_grad=False))
        linear.register_buffer("codes", torch.arange(5, dtype=torch.uint8))
        del linear.more


def with_method(ffn: nn.Module, method: Quantising) -> nn.Module:
    for linear in (ffn.gate_up_proj, ffn.down_proj):
        linear.quant_method = method
        linear.more = nn.Parameter(torch.ones(2), requires_grad=False)
    return ffn


@contextmanager
def quantised_ranks(monkeypatch: pytest.MonkeyPatch, method: Quantising) -> Iterator[list[Rank]]:
    def layers() -> Iterator[nn.Module]:
        for layer in make_layers():
            with_method(layer.mlp, method)
            yield layer

    monkeypatch.setattr(f"{__name__}.built_layers", layers)
    with ranks(loads_in_place=False) as both:
        for rank in both:
            load(rank)
        yield both


def process(rank: Rank) -> None:
    """SGLang's `postprocess_weights` as the rank hooks it."""

    def modules_with_quant_method(model: nn.Module) -> Iterator[Any]:
        for part in model.modules():
            if (method := getattr(part, "quant_method", None)) is not None:
                yield part, method

    def postprocess(model: nn.Module, device: Any) -> None:
        found = processing._without_foreign(modules_with_quant_method, model)
        for part, method in found:
            method.process_weights_after_loading(part)

    processing = rank.offloader.processing
    processing._postprocess(postprocess, nn.ModuleList(rank.layers), "cpu")


def test_others_have_the_form_of_processed_weights_and_the_bytes_of_their_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = Quantising(lambda linear: {"workspace": torch.zeros(2), "num_bits": 8})
    with quantised_ranks(monkeypatch, method) as both:
        for rank in both:
            for layer in range(NUM_LAYERS):
                for parameter in rank.weights(layer).values():
                    assert bool(parameter.numel()) == (layer in rank.owned())
                    assert not parameter.is_meta, "some methods ask for the object"
            process(rank)
        expected = copy.deepcopy(
            {n: dict(both[OWNERS[n]].ffn(n).state_dict()) for n in range(NUM_LAYERS)}
        )
        for rank in both:  # what post_init does before the ranks meet
            rank.offloader._lay_out()
        for rank in both:
            rank.offloader.post_init()
        for rank in both:
            for layer in range(NUM_LAYERS):
                rank.pool.enter(layer)
                ffn = rank.ffn(layer)
                state = ffn.state_dict()
                assert state.keys() == expected[layer].keys()
                for name, tensor in expected[layer].items():
                    if tensor.numel():
                        assert torch.equal(state[name], tensor), (layer, name)
                        assert state[name].stride() == tensor.stride()
                        assert state[name].dtype == tensor.dtype
                assert ffn.down_proj.num_bits == 8 and ffn.down_proj.workspace.numel() == 2
                rank.pool.leave(layer)


@pytest.mark.parametrize(
    "made", [lambda linear: linear.weight.sum(), lambda linear: float(linear.weight.sum())]
)
def test_what_is_made_of_weights_beside_parameters_is_refused(
    made: Callable[[nn.Module], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Quantising(lambda linear: {"folded": made(linear)})
    with (
        quantised_ranks(monkeypatch, method) as both,
        pytest.raises(SidpError, match=r"folded of mlp\.\w+_proj is made from its weights"),
    ):
        process(both[0])


def test_another_form_than_the_owner_s_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with quantised_ranks(monkeypatch, Quantising()) as both:
        for rank in both:
            process(rank)
        other = both[0].ffn(1).down_proj
        other.weight = nn.Parameter(other.weight.to(torch.uint8), requires_grad=False)
        for rank in both:
            rank.offloader._lay_out()
        with pytest.raises(SidpError, match="layer 1 has another form at the rank that owns it"):
            both[0].offloader.post_init()


def test_nothing_is_loaded_into_what_is_processed_without_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with quantised_ranks(monkeypatch, Quantising()) as both:
        parameter: Any = both[0].weights(1)["down_proj.weight"]
        with pytest.raises(RuntimeError, match=r"mlp\.down_proj\.weight \(layer 1\) of a layer"):
            parameter.weight_loader(parameter, torch.zeros(1))


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
        f"{__name__}.built_layers",
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

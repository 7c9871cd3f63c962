"""A model's layers pass by while they are built: own tensors are loaded into the rank's block, and
those of other ranks take no memory."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from sidp_sgl.errors import SidpError
from sidp_sgl.sglang_hooks.model.offloader import PoolOffloader
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.transport.shm.transport import ShmTransport
from tests.unit.sglang_hooks.model.test_units import Attention, Ffn, module

OWNERS = [0, 1, 0, 1]


def layers(num_layers: int = len(OWNERS)) -> Iterator[nn.Module]:
    for _ in range(num_layers):
        yield module(self_attn=module(attn=Attention()), mlp=Ffn())


@pytest.fixture
def offloader() -> Iterator[PoolOffloader]:
    transport = ShmTransport()
    pool = WeightPool(transport, 0, 2, OWNERS, "ticketed", 1)
    yield PoolOffloader(pool, "ffn", lambda units: pytest.fail("nobody to meet"))
    transport.close()


def weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    return dict(layer.mlp.named_parameters())  # type: ignore[union-attr, operator]


def test_own_tensors_are_loaded_into_the_block_and_no_others(offloader: PoolOffloader) -> None:
    built = offloader.wrap_modules(layers())
    for index, layer in enumerate(built):
        for name, parameter in weights(layer).items():
            assert parameter.shape == dict(Ffn().named_parameters())[name].shape
            assert parameter.is_meta == (OWNERS[index] != 0)
    before = weights(built[2])["gate_up_proj.weight"]
    values = torch.randn(before.shape)
    before.data.copy_(values)  # as a weight loader does
    offloader._view_blocks()
    block = offloader._blocks[2]["mlp.gate_up_proj.weight"]
    after = weights(built[2])["gate_up_proj.weight"]
    assert torch.equal(block, values)
    assert after.data_ptr() == block.data_ptr() == before.data_ptr()
    assert after.sidp_pooled  # type: ignore[attr-defined]


def test_what_loading_puts_elsewhere_moves_into_the_block(offloader: PoolOffloader) -> None:
    built = offloader.wrap_modules(layers())
    values = torch.randn(8, 24)
    weights(built[0])["down_proj.weight"].data = values
    offloader._view_blocks()
    assert torch.equal(offloader._blocks[0]["mlp.down_proj.weight"], values)
    assert weights(built[0])["down_proj.weight"].data_ptr() != values.data_ptr()


@pytest.mark.parametrize("changed", [torch.zeros(24, 8), torch.zeros(8, 24).bfloat16()])
def test_a_tensor_of_another_form_is_refused(
    offloader: PoolOffloader, changed: torch.Tensor
) -> None:
    built = offloader.wrap_modules(layers())
    weights(built[0])["down_proj.weight"].data = changed
    with pytest.raises(SidpError, match="has changed its form"):
        offloader._view_blocks()


@pytest.mark.parametrize("num_layers", [3, 5])
def test_a_model_with_other_layers_than_its_config_says_is_refused(
    offloader: PoolOffloader, num_layers: int
) -> None:
    with pytest.raises(SidpError, match=f"{num_layers} layers where its config says 4"):
        offloader.wrap_modules(layers(num_layers))

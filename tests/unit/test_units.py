"""Units found by structure, and the placeholders that stand for them."""

import pytest
import torch
from sglang.srt.layers.linear import LinearBase, RowParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.radix_attention import RadixAttention
from torch import nn

from sidp_sgl.config import SidpError
from sidp_sgl.sglang_hooks import cpu_memory, placeholders
from sidp_sgl.sglang_hooks.units import find_units

HIDDEN, WIDE = 8, 24


class Linear(LinearBase):
    """SGLang's class without the set-up of a distributed engine."""

    def __init__(self, input_size: int, output_size: int) -> None:
        nn.Module.__init__(self)
        self.input_size, self.output_size = input_size, output_size
        self.weight = nn.Parameter(torch.zeros(output_size, input_size), requires_grad=False)


class RowLinear(RowParallelLinear):
    __init__ = Linear.__init__  # type: ignore[assignment]


class Attention(RadixAttention):
    __init__ = nn.Module.__init__


class Experts(FusedMoE):
    __init__ = nn.Module.__init__


def module(**children: nn.Module) -> nn.Module:
    result = nn.Module()
    for name, child in children.items():
        result.add_module(name, child)
    return result


def attention() -> nn.Module:
    return module(
        qkv_proj=Linear(HIDDEN, 2 * HIDDEN),
        q_norm=nn.LayerNorm(HIDDEN),
        attn=Attention(),
        o_proj=RowLinear(HIDDEN, HIDDEN),
    )


def ffn() -> nn.Module:
    return module(gate_up_proj=Linear(HIDDEN, 2 * WIDE), down_proj=RowLinear(WIDE, HIDDEN))


def decoder_layer(**more: nn.Module) -> nn.Module:
    norm = nn.LayerNorm(HIDDEN)
    return module(self_attn=attention(), mlp=ffn(), input_layernorm=norm, **more)


def test_ffn_pools_the_ffn_only() -> None:
    layer = decoder_layer()
    (unit,) = find_units(layer, 0, "ffn")
    assert unit.name == "mlp"
    assert unit.module is layer.mlp


def test_linear_pools_the_projections_in_the_order_of_the_forward_pass() -> None:
    names = [unit.name for unit in find_units(decoder_layer(), 0, "linear")]
    assert names == ["self_attn.qkv_proj", "self_attn.o_proj", "mlp"]


def test_the_names_of_modules_do_not_matter() -> None:
    layer = module(attention=attention(), feed_forward=ffn())
    assert [unit.name for unit in find_units(layer, 0, "ffn")] == ["feed_forward"]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (decoder_layer(experts=Experts()), "layer 3 .* mixture of experts"),
        (decoder_layer(second_mlp=ffn()), "1 attention and 2 FFN"),
        (module(self_attn=attention()), "1 attention and 0 FFN"),
        (module(mlp=ffn()), "0 attention and 1 FFN"),
        (
            module(
                self_attn=attention(),
                mlp=module(up_proj=Linear(HIDDEN, WIDE), down_proj=RowLinear(WIDE, 2 * HIDDEN)),
            ),
            "0 FFN",
        ),
    ],
    ids=["experts", "two FFNs", "no FFN", "no attention", "another width"],
)
def test_other_layers_are_refused_in_one_line(layer: nn.Module, reason: str) -> None:
    with pytest.raises(SidpError, match=reason) as raised:
        find_units(layer, 3, "ffn")
    assert "\n" not in str(raised.value)


def weight_with_attributes(layer: nn.Module) -> nn.Parameter:
    weight = layer.mlp.down_proj.weight
    weight.weight_loader = lambda parameter, loaded: None
    weight.input_dim = 1
    weight.output_dim = 0
    return weight


NAME = "mlp.down_proj.weight"


def test_a_placeholder_keeps_shape_and_attributes_and_no_memory() -> None:
    layer = decoder_layer()
    old = weight_with_attributes(layer)
    placeholders.make_placeholder(layer, NAME)
    new = dict(layer.named_parameters())[NAME]
    assert new is not old
    assert new.is_meta
    assert (new.shape, new.stride(), new.dtype) == (old.shape, old.stride(), old.dtype)
    assert (new.input_dim, new.output_dim, new.requires_grad) == (1, 0, False)


@pytest.mark.parametrize("has_loader", [True, False])
def test_a_placeholder_refuses_to_be_loaded(has_loader: bool) -> None:
    layer = decoder_layer()
    if has_loader:
        weight_with_attributes(layer)
    placeholders.make_placeholder(layer, NAME)
    parameter = layer.get_parameter(NAME)
    with pytest.raises(RuntimeError, match=r"mlp\.down_proj\.weight of a layer owned by another"):
        parameter.weight_loader(parameter, torch.zeros(HIDDEN, WIDE))


def test_a_view_of_the_pool_keeps_attributes_and_counts_no_memory() -> None:
    layer = decoder_layer()
    weight_with_attributes(layer)
    before = cpu_memory.resident_bytes(layer)
    placeholders.make_placeholder(layer, NAME)
    slot = torch.arange(HIDDEN * WIDE, dtype=torch.float32).view(HIDDEN, WIDE)
    placeholders.view_pool(layer, NAME, slot)
    new = layer.get_parameter(NAME)
    assert new.data_ptr() == slot.data_ptr(), "a view, not a copy"
    assert (new.input_dim, new.output_dim, new.sidp_pooled) == (1, 0, True)
    assert before - cpu_memory.resident_bytes(layer) == HIDDEN * WIDE * 4


def test_tensors_are_named_within_the_layer_in_a_fixed_order() -> None:
    pairs = [(unit.name, unit.module) for unit in find_units(decoder_layer(), 0, "linear")]
    assert [name for name, _ in placeholders.named_tensors(pairs)] == [
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
    ]

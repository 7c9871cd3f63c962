"""Units found by structure, and the placeholders that stand for them."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.linear import LinearBase, RowParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.radix_attention import RadixAttention
from torch import nn

from sidp_sgl.errors import SidpError
from sidp_sgl.sglang_hooks.cpu import memory as cpu_memory
from sidp_sgl.sglang_hooks.model import placeholders
from sidp_sgl.sglang_hooks.model.units import Unit, find_blocks, pooled_unit, use_one_stream
from sidp_sgl.weightpool.alignment import align
from sidp_sgl.weightpool.cas.unit import RowType

HIDDEN, WIDE = 8, 24


class Unquantised:
    def apply(self, linear: nn.Module, rows: torch.Tensor, bias: object = None) -> torch.Tensor:
        return rows @ linear.weight.t()


class Linear(LinearBase):
    """SGLang's class without the set-up of a distributed engine."""

    def __init__(self, input_size: int, output_size: int) -> None:
        nn.Module.__init__(self)
        self.input_size, self.output_size = input_size, output_size
        self.params_dtype, self.skip_bias_add, self.bias = torch.float32, False, None
        self.quant_method = Unquantised()
        weight = torch.arange(output_size * input_size).view(output_size, input_size) % 7 - 3.0
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        return rows @ self.weight.t(), None


class RowLinear(RowParallelLinear):
    __init__ = Linear.__init__  # type: ignore[assignment]
    forward = Linear.forward  # type: ignore[assignment]


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = Linear(HIDDEN, 2 * WIDE), RowLinear(WIDE, HIDDEN)

    def forward(self, rows: torch.Tensor, forward_batch: object = None) -> torch.Tensor:
        gate, up = self.gate_up_proj(rows)[0].chunk(2, dim=-1)
        return self.down_proj(gate.relu() * up)[0]


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
    return Ffn()


def decoder_layer(**more: nn.Module) -> nn.Module:
    norm = nn.LayerNorm(HIDDEN)
    return module(self_attn=attention(), mlp=ffn(), input_layernorm=norm, **more)


def test_ffn_pools_the_ffn_only() -> None:
    layer = decoder_layer()
    ((unit,),) = find_blocks(layer, 0, "ffn")
    assert unit.name == "mlp"
    assert unit.module is layer.mlp


def test_linear_pools_the_projections_in_the_order_of_the_forward_pass() -> None:
    names = [
        unit.name for (units,) in [find_blocks(decoder_layer(), 0, "linear")] for unit in units
    ]
    assert names == ["self_attn.qkv_proj", "self_attn.o_proj", "mlp"]


def test_the_names_of_modules_do_not_matter() -> None:
    layer = module(attention=attention(), feed_forward=ffn())
    assert [unit.name for (unit,) in find_blocks(layer, 0, "ffn")] == ["feed_forward"]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (decoder_layer(experts=Experts()), "1 attention and 2 FFN"),
        (module(self_attn=attention(), experts=Experts()), "where a router and one set of experts"),
        (
            module(self_attn=attention(), mlp=module(a=Experts(), b=Experts())),
            "where a router and one set of experts",
        ),
        (
            module(self_attn=attention(), mlp=module(inner=module(experts=Experts()))),
            "where a router and one set of experts",
        ),
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
    ids=[
        "experts beside an FFN",
        "experts alone",
        "two sets",
        "deep experts",
        "two FFNs",
        "no FFN",
        "no attention",
        "another width",
    ],
)
def test_other_layers_are_refused_in_one_line(layer: nn.Module, reason: str) -> None:
    with pytest.raises(SidpError, match=reason) as raised:
        find_blocks(layer, 3, "ffn")
    assert "\n" not in str(raised.value)


def mixture() -> nn.Module:
    return module(gate=Linear(HIDDEN, 4), experts=Experts(), topk=nn.Module(), shared_expert=ffn())


def test_of_a_mixture_the_shared_experts_come_first_and_the_router_stays() -> None:
    ((shared, experts),) = find_blocks(module(self_attn=attention(), mlp=mixture()), 0, "ffn")
    assert (shared.name, experts.name) == ("mlp.shared_expert", "mlp.experts")


def test_a_mixture_runs_on_one_stream() -> None:
    layer = module(self_attn=attention(), mlp=mixture())
    layer.mlp.alt_stream = layer.self_attn.alt_stream = object()
    use_one_stream(layer, find_blocks(layer, 0, "ffn")[0])
    assert layer.mlp.alt_stream is None and layer.self_attn.alt_stream is not None


def test_latent_attention_stays_on_every_rank() -> None:
    layer = module(self_attn=attention(), mlp=ffn())
    layer.self_attn.kv_b_proj = Linear(HIDDEN, HIDDEN)
    ((unit,),) = find_blocks(layer, 0, "linear")
    assert unit.name == "mlp"


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
    placeholders.make_placeholder(layer, NAME, layer.get_parameter(NAME))
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
    placeholders.make_placeholder(layer, NAME, layer.get_parameter(NAME))
    parameter = layer.get_parameter(NAME)
    with pytest.raises(RuntimeError, match=r"mlp\.down_proj\.weight of a layer owned by another"):
        parameter.weight_loader(parameter, torch.zeros(HIDDEN, WIDE))


def test_a_view_of_the_pool_keeps_attributes_and_counts_no_memory() -> None:
    layer = decoder_layer()
    weight_with_attributes(layer)
    before = cpu_memory.resident_bytes(layer)
    placeholders.make_placeholder(layer, NAME, layer.get_parameter(NAME))
    slot = torch.arange(HIDDEN * WIDE, dtype=torch.float32).view(HIDDEN, WIDE)
    placeholders.view_pool(layer, NAME, slot, is_parameter=True)
    new = layer.get_parameter(NAME)
    assert new.data_ptr() == slot.data_ptr(), "a view, not a copy"
    assert (new.input_dim, new.output_dim, new.sidp_pooled) == (1, 0, True)
    assert before - cpu_memory.resident_bytes(layer) == HIDDEN * WIDE * 4


def test_tensors_are_named_within_the_layer_in_a_fixed_order() -> None:
    pairs = [
        (unit.name, unit.module)
        for (units,) in [find_blocks(decoder_layer(), 0, "linear")]
        for unit in units
    ]
    assert [name for name, _ in placeholders.named_tensors(pairs)] == [
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
    ]


def rows_of(width: int, num_rows: int = 3) -> torch.Tensor:
    return torch.arange(num_rows * width).view(num_rows, width) % 5 - 2.0


def test_an_ffn_computed_elsewhere_gives_what_its_forward_gives() -> None:
    ((unit,),) = find_blocks(decoder_layer(), 0, "ffn")
    pooled = pooled_unit(unit, 5, 2, is_last=True)
    assert (pooled.number, pooled.block, pooled.is_last) == (5, 2, True)
    row = RowType(HIDDEN, torch.float32)
    assert (pooled.payload, pooled.result) == ((row,), row)
    assert pooled.row_bytes == (align(HIDDEN * 4), HIDDEN * 4)
    rows = rows_of(HIDDEN)
    expected = unit.module(rows, object())
    assert expected.any()
    assert torch.equal(pooled.forward(rows, object()), expected)
    assert torch.equal(pooled.finish(pooled.partial(rows)), expected)


def test_projections_computed_elsewhere_give_what_their_forwards_give() -> None:
    units = find_blocks(decoder_layer(), 0, "linear")[0][:2]
    for unit, widths in zip(units, [(HIDDEN, 2 * HIDDEN), (HIDDEN, HIDDEN)], strict=True):
        pooled = pooled_unit(unit, 0, 0, is_last=False)
        assert (pooled.payload[0].width, pooled.result.width) == widths
        rows = rows_of(widths[0])
        expected, bias = unit.module(rows)
        result = pooled.finish(pooled.partial(rows))
        assert torch.equal(result[0], expected) and expected.any()
        assert result[1] is bias is None


def test_a_units_own_forward_is_kept_when_the_modules_is_wrapped() -> None:
    ((unit,),) = find_blocks(decoder_layer(), 0, "ffn")
    pooled = pooled_unit(unit, 0, 0, is_last=True)
    expected = unit.module(rows_of(HIDDEN))
    unit.module.forward = lambda *_: pytest.fail("the wrapper was called")  # type: ignore[assignment]
    assert torch.equal(pooled.partial(rows_of(HIDDEN)), expected)
    assert torch.equal(pooled.forward(rows_of(HIDDEN)), expected)


def test_a_projection_that_leaves_its_bias_to_its_caller_is_refused() -> None:
    linear = Linear(HIDDEN, HIDDEN)
    linear.skip_bias_add = True
    with pytest.raises(
        SidpError, match=r"self_attn\.o_proj leaves its bias .* use --sidp-pool ffn"
    ) as e:
        pooled_unit(Unit("self_attn.o_proj", linear), 0, 3, is_last=False)
    assert "\n" not in str(e.value)
    ffn_with_one = ffn()
    ffn_with_one.down_proj.skip_bias_add = True  # its own module's business
    pooled_unit(Unit("mlp", ffn_with_one), 0, 3, is_last=True)


@pytest.mark.parametrize("pool", ["ffn", "linear"])
def test_an_owner_computes_its_own_part_without_sglangs_forwards(
    pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may hold a collective, and look at flags of the forward pass in another thread."""
    (units,) = find_blocks(decoder_layer(), 0, pool)
    pooled = [pooled_unit(unit, n, 0, is_last=False) for n, unit in enumerate(units)]
    rows = [rows_of(unit.payload[0].width) for unit in pooled]
    expected = [unit.forward(r) for unit, r in zip(pooled, rows, strict=True)]
    for kind in (Linear, RowLinear):
        monkeypatch.setattr(kind, "forward", lambda *_: pytest.fail("SGLang's forward"))
    for unit, r, result in zip(pooled, rows, expected, strict=True):
        whole = result[0] if isinstance(result, tuple) else result
        assert torch.equal(unit.partial(r), whole) and whole.any()


def tp_layer(tp_rank: int, tp_size: int) -> nn.Module:
    """A rank's shard of `decoder_layer`, as SGLang's linear layers describe it."""
    layer, group = decoder_layer(), SimpleNamespace(rank_in_group=tp_rank, world_size=tp_size)
    for linear in [part for part in layer.modules() if isinstance(part, LinearBase)]:
        linear.tp_group = group
        if isinstance(linear, RowParallelLinear):
            linear.reduce_results, linear.input_is_parallel = False, True
            linear.input_size_per_partition = linear.input_size // tp_size
            linear.weight.data = linear.weight.data[:, : linear.input_size_per_partition]
        else:
            linear.output_size_per_partition = linear.output_size // tp_size
            linear.weight.data = linear.weight.data[: linear.output_size_per_partition]
    return layer


def test_rows_of_a_shard_have_its_widths() -> None:
    (units,) = find_blocks(tp_layer(1, 2), 0, "linear")
    pooled = [pooled_unit(unit, n, 0, is_last=False) for n, unit in enumerate(units)]
    widths = [(unit.payload[0].width, unit.result.width) for unit in pooled]
    assert widths == [(HIDDEN, HIDDEN), (HIDDEN // 2, HIDDEN), (HIDDEN, HIDDEN)]
    for unit in pooled:
        rows = rows_of(unit.payload[0].width)
        assert unit.partial(rows).shape == (len(rows), unit.result.width)


@pytest.mark.parametrize("tp_rank", [0, 1])
def test_one_tp_rank_adds_the_bias_of_a_sum(tp_rank: int) -> None:
    layer = tp_layer(tp_rank, 2)
    biases = {}

    class Biased(Unquantised):
        def apply(self, linear: nn.Module, rows: torch.Tensor, bias: object = None) -> torch.Tensor:
            biases[linear] = bias
            return super().apply(linear, rows)

    (units,) = find_blocks(layer, 0, "linear")
    for unit in units[:2]:
        unit.module.bias, unit.module.quant_method = torch.ones(1), Biased()
        pooled = pooled_unit(unit, 0, 0, is_last=False)
        pooled.partial(rows_of(pooled.payload[0].width))
    qkv, o = (biases[unit.module] is not None for unit in units[:2])
    assert (qkv, o) == (True, tp_rank == 0), "the columns' bias is cut as they are"


@pytest.mark.parametrize(
    ("linear", "attribute", "value"),
    [
        ("down_proj", "reduce_results", True),
        ("down_proj", "input_is_parallel", False),
        ("gate_up_proj", "gather_output", True),
    ],
)
def test_a_unit_that_needs_its_tp_group_is_refused(
    linear: str, attribute: str, value: bool
) -> None:
    layer = tp_layer(0, 2)
    setattr(getattr(layer.mlp, linear), attribute, value)
    with pytest.raises(SidpError, match=r"mlp of layer 3 .* sums over its TP .* --tp-size 1") as e:
        find_blocks(layer, 3, "ffn")
    assert "\n" not in str(e.value)
    alone = tp_layer(0, 1)
    setattr(getattr(alone.mlp, linear), attribute, value)
    find_blocks(alone, 3, "ffn")


def test_an_owner_computes_with_the_weights_as_they_are_then() -> None:
    layer = decoder_layer()
    ((unit,),) = find_blocks(layer, 0, "ffn")
    pooled = pooled_unit(unit, 0, 0, is_last=True)
    before = pooled.partial(rows_of(HIDDEN))
    weight = layer.mlp.down_proj.weight
    placeholders.view_pool(layer, NAME, 2 * weight.data, is_parameter=True)
    assert torch.equal(pooled.partial(rows_of(HIDDEN)), 2 * before) and before.any()

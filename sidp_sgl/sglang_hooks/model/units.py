"""Finds the poolable units of a decoder layer by structure, not by a list of class names.

A unit is a module whose tensors are pooled: the FFN; of a mixture its experts and its shared ones,
while the router stays on every rank; and with `linear` the attention's projections. They come in
the order in which a layer's forward pass calls them, in the blocks that are fetched as a whole.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import LinearBase, RowParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.radix_attention import RadixAttention
from torch import nn

from sidp_sgl.config import FFN
from sidp_sgl.errors import SidpError
from sidp_sgl.sglang_hooks.model.experts import pooled_experts
from sidp_sgl.sglang_hooks.model.tables import Piece, pooled_piece
from sidp_sgl.weightpool.cas.unit import PooledUnit, RowType


@dataclass(frozen=True)
class Unit:
    """`name`: path within the layer, e.g. 'mlp' or 'self_attn.qkv_proj'."""

    name: str
    module: nn.Module


def find_blocks(layer: nn.Module, index: int, pool: str) -> list[list[Unit]]:
    """The blocks of decoder layer `index` for a `--sidp-pool`, as lists of units.

    Raises SidpError where the layer has no recognisable FFN, or a unit of it can't be computed
    without its TP group.
    """
    kind = type(layer).__name__
    attention = [(n, m) for n, m in layer.named_children() if _contains(m, RadixAttention)]
    ffns = [(n, m) for n, m in layer.named_children() if _is_ffn(m) or _contains(m, FusedMoE)]
    if len(attention) != 1 or len(ffns) != 1 or _contains(attention[0][1], FusedMoE):
        raise SidpError(
            f"--sidp: layer {index} ({kind}) has {len(attention)} attention and {len(ffns)} FFN "
            "modules where one each is expected: this model can't be pooled, start without --sidp"
        )
    units = []
    if pool != FFN:
        units += _projections(*attention[0])
    units += _ffn_units(*ffns[0])
    num_experts = sum(isinstance(module, FusedMoE) for module in layer.modules())
    if num_experts != sum(isinstance(unit.module, FusedMoE) for unit in units) or num_experts > 1:
        raise SidpError(
            f"--sidp: layer {index} ({kind}) has its experts where a router and one set of experts "
            "are expected: this model can't be pooled, start without --sidp"
        )
    for unit in units:
        if any(_has_collective(linear) for linear in _linears(unit.module)):
            raise SidpError(
                f"--sidp: {unit.name} of layer {index} ({kind}) sums over its TP ranks by itself, "
                "which an owner can't do for others: use --tp-size 1, or start without --sidp"
            )
    return [units]


def _projections(name: str, attention: nn.Module) -> list[Unit]:
    """None of MLA's: SGLang folds them into other tensors, or reads them past their forward."""
    if hasattr(attention, "kv_b_proj"):
        return []
    return [
        Unit(f"{name}.{child_name}", child)
        for child_name, child in attention.named_children()
        if isinstance(child, LinearBase)
    ]


def _ffn_units(name: str, ffn: nn.Module) -> list[Unit]:
    """Shared experts are called before the others."""
    if _is_ffn(ffn):
        return [Unit(name, ffn)]
    children = [Unit(f"{name}.{n}", child) for n, child in ffn.named_children()]
    shared = [unit for unit in children if _is_ffn(unit.module)]
    return shared + [unit for unit in children if isinstance(unit.module, FusedMoE)]


def use_one_stream(layer: nn.Module, units: list[Unit]) -> None:
    """A slot is released where its last unit ends: no unit of the block may run beside it."""
    for unit in units:
        parent = layer.get_submodule(unit.name.rpartition(".")[0])
        if getattr(parent, "alt_stream", None) is not None:
            parent.alt_stream = None


def pooled_unit(unit: Unit, number: int, block: int, *, is_last: bool) -> PooledUnit:
    """`unit` as the weight pool sees it; before its forward is wrapped."""
    module = unit.module
    if isinstance(module, Piece):
        return pooled_piece(module, number, block, is_last=is_last)
    if isinstance(module, FusedMoE):
        return pooled_experts(module, number, block, is_last=is_last)
    linears = _linears(module)
    is_linear = isinstance(module, LinearBase)
    if is_linear and module.skip_bias_add:
        raise SidpError(
            f"--sidp-pool linear: {unit.name} leaves its bias to its caller, which can't be "
            "pooled: use --sidp-pool ffn"
        )
    own_part = _OwnPart(module) if is_linear else own_part_of(module)
    dtype = linears[0].params_dtype

    def partial(rows: torch.Tensor) -> torch.Tensor:
        return own_part(rows)[0] if is_linear else own_part(rows)

    def finish(rows: torch.Tensor) -> Any:
        return (rows, None) if is_linear else rows

    return PooledUnit(
        number,
        block,
        is_last,
        payload=(RowType(_in_width(linears[0]), dtype),),
        result=RowType(_out_width(linears[-1]), dtype),
        forward=module.forward,
        partial=partial,
        finish=finish,
    )


class _OwnPart(nn.Module):
    """A linear layer's own part: its weights' product and nothing else. SGLang's own forward may
    add a collective, and looks at flags of the forward pass that runs in another thread."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.__dict__["_linear"] = linear  # not a submodule: its parameters are the pool's

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_linear"], name)

    def forward(self, rows: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, Any]:
        linear = self.__dict__["_linear"]
        inside, outside = (None, linear.bias) if linear.skip_bias_add else (linear.bias, None)
        if isinstance(linear, RowParallelLinear) and get_group_rank_size(linear.tp_group)[0] > 0:
            inside = None  # the TP ranks' parts are added up: one of them has the bias
        return linear.quant_method.apply(linear, rows, inside), outside


def own_part_of(module: nn.Module) -> nn.Module:
    """`module` with the same weights, whose linear layers compute their own part only."""
    twin = copy.copy(module)
    twin._modules = {
        name: child
        if child is None
        else _OwnPart(child)
        if isinstance(child, LinearBase)
        else own_part_of(child)
        for name, child in module._modules.items()
    }
    return twin


def _linears(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, LinearBase)]


def _has_collective(linear: Any) -> bool:
    """Whether its own forward talks to other TP ranks, or takes its shard of rows out of theirs."""
    return get_group_rank_size(linear.tp_group)[1] > 1 and (
        getattr(linear, "reduce_results", False)
        or getattr(linear, "gather_output", False)
        or not getattr(linear, "input_is_parallel", True)
    )


def _in_width(linear: Any) -> int:
    """Of a TP rank's shard."""
    return getattr(linear, "input_size_per_partition", linear.input_size)


def _out_width(linear: Any) -> int:
    return getattr(linear, "output_size_per_partition", linear.output_size)


def _contains(module: nn.Module, kind: type) -> bool:
    return any(isinstance(part, kind) for part in module.modules())


def _is_ffn(module: nn.Module) -> bool:
    """Linears only, the last of which returns to the width that the first takes."""
    linears = _linears(module)
    return (
        not _contains(module, RadixAttention)
        and not _contains(module, FusedMoE)
        and len(linears) >= 2
        and isinstance(linears[-1], RowParallelLinear)
        and linears[-1].output_size == linears[0].input_size
    )

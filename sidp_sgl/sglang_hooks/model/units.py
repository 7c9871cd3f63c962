"""Finds the poolable units of a decoder layer by structure, not by a list of class names.

Room: sglang_hooks. A unit is a module whose tensors are pooled: the FFN, and with `linear` the
attention's projections. They come in the order in which a layer's forward pass calls them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase, RowParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.radix_attention import RadixAttention
from torch import nn

from sidp_sgl.errors import SidpError
from sidp_sgl.weightpool.cas.unit import PooledUnit


@dataclass(frozen=True)
class Unit:
    """`name`: path within the layer, e.g. 'mlp' or 'self_attn.qkv_proj'."""

    name: str
    module: nn.Module


def find_units(layer: nn.Module, index: int, pool: str) -> list[Unit]:
    """Units of one decoder layer for `--sidp-pool ffn` or `linear`.

    Raises SidpError where the layer has no recognisable FFN, or experts.
    """
    kind = type(layer).__name__
    if any(isinstance(module, FusedMoE) for module in layer.modules()):
        raise SidpError(
            f"--sidp: layer {index} ({kind}) is a mixture of experts, which can't be pooled yet: "
            "use a dense model, or start without --sidp"
        )
    attention = [(n, m) for n, m in layer.named_children() if _contains(m, RadixAttention)]
    ffns = [(n, m) for n, m in layer.named_children() if _is_ffn(m)]
    if len(attention) != 1 or len(ffns) != 1:
        raise SidpError(
            f"--sidp: layer {index} ({kind}) has {len(attention)} attention and {len(ffns)} FFN "
            "modules where one each is expected: this model can't be pooled, start without --sidp"
        )
    units = []
    if pool == "linear":
        name, module = attention[0]
        units += [
            Unit(f"{name}.{child_name}", child)
            for child_name, child in module.named_children()
            if isinstance(child, LinearBase)
        ]
    units.append(Unit(*ffns[0]))
    return units


def pooled_unit(unit: Unit, number: int, layer: int, *, is_last: bool) -> PooledUnit:
    """`unit` as the weight pool sees it; before its forward is wrapped."""
    module, forward = unit.module, unit.module.forward
    linears = [part for part in module.modules() if isinstance(part, LinearBase)]
    is_linear = isinstance(module, LinearBase)
    if is_linear and module.skip_bias_add:
        raise SidpError(
            f"--sidp-pool linear: {unit.name} of layer {layer} leaves its bias to its caller, "
            "which can't be pooled: use --sidp-pool ffn"
        )

    def compute(rows: torch.Tensor) -> torch.Tensor:
        return forward(rows)[0] if is_linear else forward(rows)

    def pack(rows: torch.Tensor) -> Any:
        return (rows, None) if is_linear else rows

    return PooledUnit(
        number,
        layer,
        is_last,
        in_width=linears[0].input_size,
        out_width=linears[-1].output_size,
        dtype=linears[0].params_dtype,
        forward=forward,
        compute=compute,
        pack=pack,
    )


def _contains(module: nn.Module, kind: type) -> bool:
    return any(isinstance(part, kind) for part in module.modules())


def _is_ffn(module: nn.Module) -> bool:
    """Linears only, the last of which returns to the width that the first takes."""
    linears = [part for part in module.modules() if isinstance(part, LinearBase)]
    return (
        not _contains(module, RadixAttention)
        and len(linears) >= 2
        and isinstance(linears[-1], RowParallelLinear)
        and linears[-1].output_size == linears[0].input_size
    )

"""Quantised layers on a CPU without sgl_kernel and Triton: SGLang's own loading and processing, and
plain PyTorch for the products, over weights that are dequantised for each of them.

Rows are quantised where SGLang's kernels would do it with a scale of the checkpoint or of each row.
"""

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks.required import Hook

_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of the eight values in 32 bits


def _quantise_fp8(
    _: object, rows: torch.Tensor, scale: torch.Tensor, *__: Any, **___: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's `scaled_fp8_quant` with a given scale."""
    return (rows.float() / scale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8), scale


def _product(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """rows [n, k] · weight [k, m] in float32, returned in `dtype`."""
    result = torch.matmul(rows.float(), weight)
    return (result if bias is None else result + bias).to(dtype)


def _spread(scale: torch.Tensor, block: list[int], shape: torch.Size) -> torch.Tensor:
    """A scale per `block` of the last two dimensions → one per element of `shape`."""
    spread = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return spread[..., : shape[-2], : shape[-1]]


def _fp8_linear(
    layer: Any,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    block: list[int] | None,
    scale: torch.Tensor,
) -> torch.Tensor:
    """`layer.weight` is [m, k] with a scale per `block`; without, [k, m] with one scale, or one per
    column."""
    if block is not None:
        weight = (layer.weight.float() * _spread(scale, block, layer.weight.shape)).t()
        return _product(rows, weight, bias, rows.dtype)
    weight = layer.weight.float() * (scale if scale.numel() == 1 else scale.view(1, -1))
    step, dtype = getattr(layer, "input_scale", None), rows.dtype
    if step is not None:
        rows = _quantise_fp8(None, rows, step)[0].float() * step
    return _product(rows, weight, bias, dtype)


def _fp8_apply(
    _: object, method: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    block = method.weight_block_size if method.block_quant else None
    scale = layer.weight_scale if block is None else layer.weight_scale_inv
    return _fp8_linear(layer, x, bias, block, scale)


def _compressed_fp8_apply(
    _: object, scheme: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return _fp8_linear(layer, x, bias, scheme.weight_block_size, layer.weight_scale)


def _int8_apply(
    _: object, method: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    step = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    rows = (x.float() / step).round().clamp(-127, 127)
    weight = layer.weight.float() * layer.weight_scale.view(1, -1)
    return _product(rows * step, weight, bias, x.dtype)


def _fp8_moe_apply(_: object, method: Any, layer: Any, dispatch_output: Any) -> Any:
    rows, block = dispatch_output.hidden_states, method.quant_config.weight_block_size

    def dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (weight.float() * _spread(scale, block, weight.shape)).to(rows.dtype)

    experts = SimpleNamespace(
        num_experts=layer.num_experts,
        w13_weight=dequantised(layer.w13_weight, layer.w13_weight_scale_inv),
        w2_weight=dequantised(layer.w2_weight, layer.w2_weight_scale_inv),
    )
    result = moe_forward_native(experts, rows, dispatch_output.topk_output, layer.moe_runner_config)
    return StandardCombineInput(hidden_states=result)


def _awq_dequantise(
    _: object, qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor
) -> torch.Tensor:
    def unpacked(packed: torch.Tensor) -> torch.Tensor:
        parts = torch.stack([(packed >> (4 * place)) & 15 for place in _AWQ_ORDER], dim=-1)
        return parts.reshape(packed.shape[0], -1)

    group = qweight.shape[0] // scales.shape[0]
    zeros, steps = (part.repeat_interleave(group, 0) for part in (unpacked(qzeros), scales))
    return (unpacked(qweight) - zeros).to(scales.dtype) * steps


def _scheme_is_supported(
    original: Any, config: object, min_capability: int, error: bool = True
) -> bool:
    """SGLang asks the GPU; what has no product here is refused before (`CPU_QUANTISATIONS`)."""
    return True


_QUANTIZATION = "sglang.srt.layers.quantization"
_COMPRESSED = f"{_QUANTIZATION}.compressed_tensors"
_SCHEMES = f"{_COMPRESSED}.schemes"
HOOKS = [
    Hook(target, function, HookType.AROUND)
    for target, function in (
        (f"{_QUANTIZATION}.utils.scaled_fp8_quant", _quantise_fp8),
        (f"{_QUANTIZATION}.fp8.Fp8LinearMethod.apply", _fp8_apply),
        (f"{_QUANTIZATION}.fp8.Fp8MoEMethod.apply", _fp8_moe_apply),
        (f"{_QUANTIZATION}.w8a8_int8.W8A8Int8LinearMethod.apply", _int8_apply),
        (
            f"{_COMPRESSED}.compressed_tensors.CompressedTensorsConfig._check_scheme_supported",
            _scheme_is_supported,
        ),
        (
            f"{_SCHEMES}.compressed_tensors_w8a8_fp8.CompressedTensorsW8A8Fp8.apply_weights",
            _compressed_fp8_apply,
        ),
        (
            f"{_SCHEMES}.compressed_tensors_w8a8_int8.CompressedTensorsW8A8Int8.apply_weights",
            _int8_apply,
        ),
        (
            "sglang.srt.hardware_backend.gpu.quantization.awq_kernels.awq_dequantize",
            _awq_dequantise,
        ),
    )
]

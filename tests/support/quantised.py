"""Quantised forms of the checkpoints that `checkpoints.py` writes: same model, fewer bits."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_GROUP = 32
_BLOCK = 128

Tensors = Iterator[tuple[str, torch.Tensor]]


def _fp8_blocks(name: str, weight: torch.Tensor) -> Tensors:
    """A scale per block of 128 × 128; the last ones may be smaller."""
    scales = torch.zeros([-(-size // _BLOCK) for size in weight.shape])
    codes = weight.to(torch.float32, copy=True)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = codes[row * _BLOCK :, column * _BLOCK :][:_BLOCK, :_BLOCK]
            scales[row, column] = block.abs().max() / _FP8_MAX
            block /= scales[row, column]
    yield name, codes.to(_FP8)
    yield f"{name}_scale_inv", scales


def _fp8_tensors(name: str, weight: torch.Tensor) -> Tensors:
    """One scale for the weight and one for the rows."""
    scale = weight.float().abs().max() / _FP8_MAX
    yield name, (weight.float() / scale).to(_FP8)
    yield f"{name}_scale", scale
    yield name.removesuffix("weight") + "input_scale", torch.tensor(0.04 + len(name) % 7 / 500)


def _per_channel(largest: float, dtype: torch.dtype) -> Callable[[str, torch.Tensor], Tensors]:
    def quantised(name: str, weight: torch.Tensor) -> Tensors:
        scale = weight.float().abs().amax(1, keepdim=True) / largest
        codes = weight.float() / scale
        yield name, (codes if dtype.is_floating_point else codes.round()).to(dtype)
        yield f"{name}_scale", scale

    return quantised


def _awq(name: str, weight: torch.Tensor) -> Tensors:
    """Four bits, in groups of 32 rows of the transposed weight."""
    transposed = weight.float().t().contiguous()
    groups = transposed.view(-1, _AWQ_GROUP, transposed.shape[1])
    highest, lowest = groups.amax(1), groups.amin(1)
    scales = ((highest - lowest) / 15).clamp(min=1e-5)
    zeros = (-lowest / scales).round().clamp(0, 15)
    codes = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)

    def packed(values: torch.Tensor) -> torch.Tensor:
        values = values.to(torch.int32).view(values.shape[0], -1, 8)
        return sum(values[:, :, place] << (4 * n) for n, place in enumerate(_AWQ_ORDER))  # type: ignore[return-value]

    base = name.removesuffix("weight")
    yield f"{base}qweight", packed(codes.view_as(transposed))
    yield f"{base}qzeros", packed(zeros)
    yield f"{base}scales", scales.to(torch.float16)


def _compressed(kind: str) -> dict[str, Any]:
    bits: dict[str, Any] = {"num_bits": 8, "type": kind, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**bits, "strategy": "channel", "dynamic": False},
                "input_activations": {**bits, "strategy": "token", "dynamic": True},
            }
        },
    }


# Name → how a weight is stored, and the config's quantization_config (None: a flag says it).
METHODS: dict[str, tuple[Callable[[str, torch.Tensor], Tensors], dict[str, Any] | None]] = {
    "fp8_blocks": (
        _fp8_blocks,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [_BLOCK, _BLOCK],
        },
    ),
    "fp8_tensors": (_fp8_tensors, {"quant_method": "fp8", "activation_scheme": "static"}),
    "w8a8_int8": (_per_channel(127.0, torch.int8), None),
    "awq": (
        _awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": _AWQ_GROUP,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        },
    ),
    "compressed_fp8": (_per_channel(_FP8_MAX, _FP8), _compressed("float")),
    "compressed_int8": (_per_channel(127.0, torch.int8), _compressed("int")),
}


def write_quantised(folder: Path, base: Path, method: str) -> Path:
    """The checkpoint in `base` with its projections quantised by one of METHODS, into `folder`."""
    quantised, settings = METHODS[method]
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name.endswith("_proj.weight"):
                tensors.update(quantised(name, tensor))
            else:
                tensors[name] = tensor
    folder.mkdir()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder

"""A checkpoint of a real model's sizes with seeded random weights, for machines without a hub."""

import json
import multiprocessing
import re
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_DTYPE = torch.bfloat16


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int, device: str) -> int:
    """config.json, one shard per layer and the index into `folder`; bytes of all tensors.

    Each tensor is drawn on `device` from a seed of its own, so that no two are alike.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=_DTYPE)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():  # tied ones once
        layer = _LAYER.search(name)
        shard = f"layer-{int(layer[1]):03}" if layer else "rest"
        shards.setdefault(f"model-{shard}.safetensors", {})[name] = parameter.shape
    index, total = {}, 0
    for shard, shapes in shards.items():
        tensors = {name: _draw(name, shape, seed, device) for name, shape in shapes.items()}
        save_file(tensors, folder / shard, {"format": "pt"})
        index.update(dict.fromkeys(tensors, shard))
        total += sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return total


def write_in_child(folder: Path, config: dict[str, Any], seed: int, device: str) -> int:
    """The same in a process of its own, whose memory on `device` goes with it."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=write_checkpoint, args=(folder, config, seed, device))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the checkpoint was not written: exit code {process.exitcode}")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return index["metadata"]["total_size"]


def _draw(name: str, shape: torch.Size, seed: int, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed + crc32(name.encode()))
    noise = torch.randn(shape, generator=generator, device=device)
    if len(shape) == 1:  # norms and biases
        values = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
    else:
        values = noise / shape[-1] ** 0.5
    return values.to(_DTYPE).cpu()

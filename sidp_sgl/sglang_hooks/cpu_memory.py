"""The device memory of a CPU rank: real, or pretended with SIDP_CPU_DEVICE_MEMORY.

Room: sglang_hooks. With a pretended device, what counts as used is what would lie on a device:
weights, buffers, pooled blocks and slots; so KV capacity is exact and the same on any machine.
"""

import os
import re

import psutil
import torch

VARIABLE = "SIDP_CPU_DEVICE_MEMORY"
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS.update({f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power})
_model: torch.nn.Module | None = None
_pool_bytes = 0


def parse_bytes(text: str) -> int:
    """Bytes of '64MiB', '1.5 GB', '1000000'; raises ValueError naming the variable."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit or float(match[1]) <= 0:
        raise ValueError(f"{VARIABLE}={text!r} is not a size: give bytes, or e.g. 64MiB or 2GB")
    return int(float(match[1]) * unit)


def pretended_bytes() -> int | None:
    text = os.environ.get(VARIABLE)
    return parse_bytes(text) if text else None


def device_total_bytes() -> int:
    pretended = pretended_bytes()
    return psutil.virtual_memory().total if pretended is None else pretended


def device_used_bytes() -> int:
    """What the rank holds on its (pretended) device, in bytes."""
    if pretended_bytes() is None:
        memory = psutil.virtual_memory()
        return memory.total - memory.available
    return _pool_bytes + (resident_bytes(_model) if _model is not None else 0)


def charge_model(model: torch.nn.Module) -> None:
    """Count the model's tensors as used from now on."""
    global _model
    _model = model


def charge_pool(num_bytes: int) -> None:
    """Count the pool's own memory (owned blocks and slots) as used; replaces earlier calls."""
    global _pool_bytes
    _pool_bytes = num_bytes


def resident_bytes(model: torch.nn.Module) -> int:
    """Bytes of the model's parameters and buffers that hold memory of their own.

    Shared storages (tied embeddings, rotary caches) count once; meta tensors and views of pool
    memory (marked by `sidp_pooled`) count nothing.
    """
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_meta or getattr(tensor, "sidp_pooled", False):
            continue
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())

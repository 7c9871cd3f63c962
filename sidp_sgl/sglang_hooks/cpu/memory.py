"""The pretended device of a CPU process: SIDP_CPU_DEVICE_MEMORY, or a share of the machine's.

What counts as used is what would lie on a device: weights, buffers, pooled blocks and slots; so KV
capacity is exact and the same on any machine.
"""

import os
import re

import psutil
import torch

from sidp_sgl.errors import SidpUsageError

VARIABLE = "SIDP_CPU_DEVICE_MEMORY"
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS.update({f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power})
DEFAULT_SHARE = 16  # of the machine's memory, per process
_ours: str | None = None  # what `divide_memory` has set
_model: torch.nn.Module | None = None
_pool_bytes = 0


def parse_bytes(text: str) -> int:
    """Bytes of '64MiB', '1.5 GB', '1000000'; raises SidpUsageError naming the variable."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper(), 0) if match else 0
    num_bytes = int(float(match[1]) * unit) if match else 0
    if num_bytes < 1:
        raise SidpUsageError(f"{VARIABLE}={text!r} is not a size: use bytes, or e.g. 64MiB or 2GB")
    return num_bytes


def device_total_bytes() -> int:
    """Size of one process's device in bytes."""
    text = os.environ.get(VARIABLE)
    return parse_bytes(text) if text else psutil.virtual_memory().total // DEFAULT_SHARE


def divide_memory(num_processes: int) -> None:
    """Set the size that an engine's processes inherit where the default is too much for that many;
    what the user has set stays."""
    global _ours
    if os.environ.get(VARIABLE) != _ours:
        return
    os.environ.pop(VARIABLE, None)
    _ours = None
    if num_processes > DEFAULT_SHARE:
        _ours = os.environ[VARIABLE] = str(psutil.virtual_memory().total // num_processes)


def device_used_bytes() -> int:
    """What this process holds on its device, in bytes, before SGLang allocates the KV cache."""
    return _pool_bytes + replicated_bytes()


def replicated_bytes() -> int:
    """Bytes of the model's tensors that are not pooled."""
    return resident_bytes(_model) if _model is not None else 0


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

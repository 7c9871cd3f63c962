"""What vendors say of GPUs: memory, bandwidth, arithmetic, links. Peaks, not what is reached."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sidp_sgl.errors import SidpUsageError


@dataclass(frozen=True)
class Gpu:
    """GB and GB/s are 10⁹ bytes (per second), TFLOPS dense. `memory_gb`: all that the driver
    reports. `fp8_tflops` and `nvlink_gbps` are 0 where the GPU has none; links per direction."""

    name: str
    memory_gb: float
    hbm_gbps: float
    bf16_tflops: float
    fp8_tflops: float
    nvlink_gbps: float
    pcie_gbps: float

    @property
    def link_gbps(self) -> float:
        """The link between two GPUs of a node."""
        return self.nvlink_gbps or self.pcie_gbps


GPUS = (
    Gpu("A100-80", 85.9, 2039, 312, 0, 300, 32),
    Gpu("H100", 85.5, 3350, 989, 1979, 450, 64),
    Gpu("H200", 150.8, 4800, 989, 1979, 450, 64),
    Gpu("H20-96", 102.6, 4000, 148, 296, 450, 64),
    Gpu("H20-141", 150.8, 4800, 148, 296, 450, 64),
    Gpu("B200", 192.3, 7700, 2250, 4500, 900, 64),
)
_ALIASES = {"H20": "H20-141", "A100": "A100-80"}
_MAY_BE_ZERO = {"fp8_tflops", "nvlink_gbps"}
_LIMIT = 1e7  # of any figure; more is a wrong unit


def find_gpu(name: str) -> Gpu:
    """A built-in GPU by name, in any case; raises SidpUsageError."""
    wanted = name.upper()
    wanted = _ALIASES.get(wanted, wanted)
    for gpu in GPUS:
        if gpu.name == wanted:
            return gpu
    raise SidpUsageError(
        f"--gpu {name!r} is unknown: choose one of {', '.join(gpu.name for gpu in GPUS)}, or "
        "describe it with --gpu-file"
    )


def read_gpu(path: str) -> Gpu:
    """A GPU from a JSON file with the fields of `Gpu`; raises SidpUsageError."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise SidpUsageError(f"--gpu-file {path} can't be read as JSON: {error}") from error
    names = {field.name for field in fields(Gpu)}
    if not isinstance(values, dict) or set(values) != names:
        raise SidpUsageError(f"--gpu-file {path} must have exactly the fields {', '.join(names)}")
    if not isinstance(values["name"], str):
        raise SidpUsageError(f"--gpu-file {path}: name {values['name']!r} is no text: quote it")
    return with_figures(Gpu(**values), {}, f"--gpu-file {path}")


def with_figures(gpu: Gpu, figures: dict[str, Any], source: str = "") -> Gpu:
    """`gpu` with some figures replaced, checked; raises SidpUsageError naming the flag."""
    gpu = replace(gpu, **figures)
    for name, value in asdict(gpu).items():
        if name == "name":
            continue
        least = 0 if name in _MAY_BE_ZERO else 1e-6
        if not _is_number(value) or not least <= value <= _LIMIT:
            where = f"{source}: {name}" if source else f"--{name.replace('_', '-')}"
            raise SidpUsageError(
                f"{where} {value!r} is out of range: use a number above 0, in GB, GB/s or TFLOPS"
            )
    return gpu


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

"""What the headers of a checkpoint's safetensors files tell before anything is loaded.

SGLang leaves a tensor that is nowhere as it happens to lie in memory, and a shard that is cut ends
the ranks one after the other.
"""

import json
import re
import struct
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidp_sgl.errors import SidpUsageError

INDEX = "model.safetensors.index.json"
_LENGTH = struct.Struct("<Q")  # of the header, in front of it
_LARGEST_HEADER = 100_000_000  # bytes, as safetensors has it
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<tensor>.+)")


def check_files(folder: Path) -> None:
    """Raise SidpUsageError in one line for a shard that is missing or cut, or an expert that lacks
    something."""
    dtypes: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        dtypes.update(read_dtypes(path))
    _check_index(folder)
    check_experts(dtypes, folder)


def read_dtypes(path: Path) -> dict[str, str]:
    """Name → dtype of every tensor of a file. Raises SidpUsageError where it is no whole one."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if length > min(size, _LARGEST_HEADER):
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise SidpUsageError(
            f"--model-path: {path} is no safetensors file ({error}): copy it again"
        ) from None
    whole = _LENGTH.size + length + end
    if size < whole:
        raise SidpUsageError(
            f"--model-path: {path} is cut, it has {size:,} of {whole:,} bytes: copy it again"
        )
    return {name: str(tensor.get("dtype")) for name, tensor in header.items()}


def _check_index(folder: Path) -> None:
    path = folder / INDEX
    if not path.is_file():
        return
    try:
        files = set(json.loads(path.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SidpUsageError(
            f"--model-path: {path} can't be read ({error!r}): copy it again"
        ) from None
    if missing := sorted(name for name in files if not (folder / name).is_file()):
        raise SidpUsageError(
            f"--model-path: {path} names {missing[0]}, which is not there: copy it, too"
        )


def check_experts(dtypes: Mapping[str, str], folder: Path) -> None:
    """Of one layer every expert has the same tensors, in the same dtypes; `dtypes` by name. Raises
    SidpUsageError."""
    layers: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name, dtype in dtypes.items():
        if match := _EXPERT.fullmatch(name):
            layers[match["experts"]][int(match["number"])][match["tensor"]] = dtype
    for experts, found in layers.items():
        # Scales of rows that calibration has not seen may be missing.
        tensors = {name for each in found.values() for name in each if name.endswith("weight")}
        for number in range(max(found) + 1):
            has = found.get(number, {})
            if missing := sorted(tensors - has.keys()):
                raise SidpUsageError(
                    f"--model-path: {folder} has no {experts}.{number}.{missing[0]}, which other "
                    "experts of that layer have: complete the checkpoint"
                )
        for tensor in sorted(tensors):
            kinds = sorted({each[tensor] for each in found.values()})
            if len(kinds) > 1:
                raise SidpUsageError(
                    f"--model-path: {folder} has {experts}.*.{tensor} in {' and '.join(kinds)}: "
                    "convert the checkpoint to one of them"
                )

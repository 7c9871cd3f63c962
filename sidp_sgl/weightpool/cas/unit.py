"""A pooled unit as the forward pass and the compute service see it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_MAX_VIEWS = 1024  # remembered per memory


@dataclass(frozen=True)
class PooledUnit:
    """One unit of one layer. All ranks of a group number their units alike.

    `compute` maps rows [num_rows, in_width] to [num_rows, out_width] where the weights are;
    `forward` is the module's own, with its own arguments and result, and `pack` turns rows that
    were computed elsewhere into such a result.
    """

    number: int
    layer: int
    is_last: bool  # of its layer
    in_width: int
    out_width: int
    dtype: torch.dtype
    forward: Callable[..., Any]
    compute: Callable[[torch.Tensor], torch.Tensor]
    pack: Callable[[torch.Tensor], Any]

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of a row on its way to the owner and back."""
        return self.in_width * self.dtype.itemsize, self.out_width * self.dtype.itemsize


class RowsViews:
    """`rows_view` of one memory, remembered: making a view takes longer than copying a few rows."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._views: dict[tuple[int, int, int, torch.dtype], torch.Tensor] = {}

    def view(self, offset: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        key = (offset, rows, width, dtype)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            found = self._views[key] = rows_view(self._memory, *key)
        return found


def rows_view(
    memory: torch.Tensor, offset: int, rows: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """[rows, width] of `dtype` in `memory` ([bytes] uint8), `offset` in bytes.

    Raises ValueError where the rows do not lie in the memory.
    """
    num_bytes = rows * width * dtype.itemsize
    if rows < 1 or offset < 0 or offset % dtype.itemsize or offset + num_bytes > memory.numel():
        raise ValueError(f"{rows} rows of {width} at byte {offset} are outside {memory.numel()}")
    return memory[offset : offset + num_bytes].view(dtype).view(rows, width)

"""A pooled unit as the forward pass and the compute service see it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sidp_sgl.weightpool.alignment import align

_MAX_VIEWS = 1024  # remembered per memory


@dataclass(frozen=True)
class RowType:
    """One row of a tensor that travels: `width` elements of `dtype`."""

    width: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def fits(self, rows: torch.Tensor) -> bool:
        """Whether `rows` is [num_rows, width] of this type."""
        return rows.dim() == 2 and rows.shape[1] == self.width and rows.dtype == self.dtype


@dataclass(frozen=True)
class PooledUnit:
    """One unit of one block. All ranks of a group number their units alike.

    `forward` is the module's own, with its own arguments and result, over weights that are here.
    The same in two parts: `partial` maps the payload, one tensor [num_rows, width] for each of
    `payload`, to the part [num_rows, width] of `result` that the weights at hand give, and knows
    nothing else: it runs in the owner's service, so it holds no collective and reads no state of a
    forward pass. `finish` makes of the sum of the parts what `forward` returns, at the requester.
    `payload_of` takes the payload out of `forward`'s arguments.
    """

    number: int
    block: int
    is_last: bool  # of its block
    payload: tuple[RowType, ...]
    result: RowType
    forward: Callable[..., Any]
    partial: Callable[..., torch.Tensor]
    finish: Callable[[torch.Tensor], Any] = lambda rows: rows
    payload_of: Callable[..., tuple[torch.Tensor, ...]] = lambda rows, *_, **__: (rows,)

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of a row on its way to the owner, all its tensors', and back."""
        return sum(align(part.num_bytes) for part in self.payload), self.result.num_bytes


class RowsViews:
    """`rows_view` of one memory, remembered: making a view takes longer than copying a few rows."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._views: dict[tuple[int, int, RowType], torch.Tensor] = {}

    def view(self, offset: int, rows: int, row: RowType) -> torch.Tensor:
        key = (offset, rows, row)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            found = self._views[key] = rows_view(self._memory, *key)
        return found

    def payload(self, unit: PooledUnit, offset: int, rows: int) -> list[torch.Tensor]:
        """The tensors of a call's payload, one behind the other from byte `offset` on."""
        views = []
        for row in unit.payload:
            views.append(self.view(offset, rows, row))
            offset += rows * align(row.num_bytes)
        return views


def rows_view(memory: torch.Tensor, offset: int, rows: int, row: RowType) -> torch.Tensor:
    """[rows, row.width] of row.dtype in `memory` ([bytes] uint8), `offset` in bytes.

    Raises ValueError where the rows do not lie in the memory.
    """
    num_bytes = rows * row.num_bytes
    if rows < 1 or offset < 0 or offset % row.dtype.itemsize or offset + num_bytes > memory.numel():
        raise ValueError(
            f"{rows} rows of {row.num_bytes} bytes at byte {offset} are outside {memory.numel()}"
        )
    return memory[offset : offset + num_bytes].view(row.dtype).view(rows, row.width)

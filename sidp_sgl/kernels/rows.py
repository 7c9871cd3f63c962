"""Rows of several ranks: packed together for one GEMM, and its results scattered to their senders.

How many rows there are, whose they are and where they lie is read from device memory, so that a
captured service graph serves any mixture of requesters up to its batch bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sidp_sgl.kernels.clock import is_kernel

_BLOCK = 1024  # 32-bit words of a row that one program copies at a time


@dataclass(frozen=True)
class RowTargets:
    """Where results go: `tensors[i]` [capacity, width], contiguous, may lie on a peer."""

    tensors: Sequence[torch.Tensor]
    addresses: torch.Tensor  # [num_targets] int64, on the device that scatters

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], device: torch.device) -> "RowTargets":
        pointers = [tensor.data_ptr() for tensor in tensors]
        return cls(tensors, torch.tensor(pointers, dtype=torch.int64, device=device))


@triton.jit
def _pack(source, index, count, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if row < tl.load(count):
        origin = tl.load(index + row).to(tl.int64)
        for begin in range(0, width, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = column < width
            values = tl.load(source + origin * width + column, mask=inside)
            tl.store(out + row.to(tl.int64) * width + column, values, mask=inside)


@triton.jit
def _scatter(rows, addresses, target, place, count, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if row < tl.load(count):
        address = tl.load(addresses + tl.load(target + row))
        out = address.to(tl.pointer_type(rows.dtype.element_ty))
        origin = tl.load(place + row).to(tl.int64)
        for begin in range(0, width, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = column < width
            values = tl.load(rows + row.to(tl.int64) * width + column, mask=inside)
            tl.store(out + origin * width + column, values, mask=inside)


def pack_rows(
    source: torch.Tensor, index: torch.Tensor, count: torch.Tensor, out: torch.Tensor
) -> None:
    """out[i] = source[index[i]] for i < count; further rows of `out` stay as they are.

    `source`: [capacity, width] and `out`: [bucket, width], contiguous; `index`: [bucket] int32;
    `count`: [1] int32.
    """
    if not is_kernel(source):
        pack_rows_reference(source, index, count, out)
        return
    words = _words(out)
    _pack[(len(words),)](
        _words(source), index, count, words, words.shape[1], BLOCK=_BLOCK, num_warps=4
    )


def scatter_rows(
    rows: torch.Tensor,
    targets: RowTargets,
    target: torch.Tensor,
    place: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """targets[target[i]][place[i]] = rows[i] for i < count.

    `rows`: [bucket, width], contiguous; `target`, `place`: [bucket] int32; `count`: [1] int32.
    """
    if not is_kernel(rows):
        scatter_rows_reference(rows, targets, target, place, count)
        return
    words = _words(rows)
    _scatter[(len(words),)](
        words, targets.addresses, target, place, count, words.shape[1], BLOCK=_BLOCK, num_warps=4
    )


def _words(rows: torch.Tensor) -> torch.Tensor:
    """The same rows as 32-bit words, whatever their dtype; their bytes must be a multiple of 4."""
    return rows.view(torch.int32)


def pack_rows_reference(
    source: torch.Tensor, index: torch.Tensor, count: torch.Tensor, out: torch.Tensor
) -> None:
    num_rows = int(count)
    out[:num_rows] = source[index[:num_rows].long()]


def scatter_rows_reference(
    rows: torch.Tensor,
    targets: RowTargets,
    target: torch.Tensor,
    place: torch.Tensor,
    count: torch.Tensor,
) -> None:
    for row in range(int(count)):
        targets.tensors[int(target[row])][int(place[row])] = rows[row]

"""How a block's tensors lie in memory: fixed order, each at a multiple of 256 bytes.

Shapes, strides and dtypes are exactly those that SGLang's kernels see after loading, so that one
fetch is one contiguous copy and views are made once. A block's owner makes the layout; the other
ranks take it over from its offer.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sidp_sgl.weightpool.alignment import align


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a block: `shape`, `stride` in elements; `offset`, `num_bytes` in bytes."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    is_parameter: bool  # else a buffer
    offset: int
    num_bytes: int

    def view(self, block: torch.Tensor) -> torch.Tensor:
        """The tensor in `block` (uint8, 1-D)."""
        piece = block[self.offset : self.offset + self.num_bytes]
        return piece.view(getattr(torch, self.dtype)).as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class BlockLayout:
    """The tensors of one block; `num_bytes` is the block's size, padded to 256."""

    tensors: tuple[TensorSpec, ...]
    num_bytes: int

    def views(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name → view into `block` (uint8, 1-D, at least `num_bytes` long)."""
        return {spec.name: spec.view(block) for spec in self.tensors}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BlockLayout":
        specs = (
            TensorSpec(**{**t, "shape": tuple(t["shape"]), "stride": tuple(t["stride"])})
            for t in values["tensors"]
        )
        return cls(tuple(specs), values["num_bytes"])


def make_layout(tensors: Iterable[tuple[str, torch.Tensor]]) -> BlockLayout:
    """Layout of (name, tensor) pairs in the given order; meta tensors are welcome.

    Raises ValueError for a tensor with gaps or overlaps, which a block can't hold.
    """
    specs, offset = [], 0
    for name, tensor in tensors:
        if tensor.numel() == 0 or not _is_dense(tensor):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} is empty or not dense")
        num_bytes = tensor.numel() * tensor.element_size()
        specs.append(
            TensorSpec(
                name,
                tuple(tensor.shape),
                tensor.stride(),
                str(tensor.dtype).removeprefix("torch."),
                isinstance(tensor, torch.nn.Parameter),
                offset,
                num_bytes,
            )
        )
        offset = align(offset + num_bytes)
    return BlockLayout(tuple(specs), offset)


def _is_dense(tensor: torch.Tensor) -> bool:
    """True for a contiguous tensor and for one with its dimensions in another order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True

"""What the kernels know of time, and whether they run as kernels at all.

On a GPU a wait is bounded in nanoseconds of the global timer; under Triton's interpreter, which
knows no inline assembly, in polls.
"""

import os

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_POLL_NANOSECONDS = tl.constexpr(64)  # between two looks: an SM's other work goes on


def is_kernel(tensor: torch.Tensor) -> bool:
    """Whether Triton takes `tensor`; otherwise the PyTorch reference does."""
    return tensor.is_cuda or INTERPRETED


@triton.jit
def now(polls, CLOCK: tl.constexpr):
    """Nanoseconds, or `polls` (int64) where there is no clock."""
    if CLOCK:
        return cuda.globaltimer()
    else:
        return polls


@triton.jit
def pause(CLOCK: tl.constexpr):
    """Leave the memory alone for a moment."""
    if CLOCK:
        tl.inline_asm_elementwise(
            "nanosleep.u32 $1; mov.u32 $0, $1;",
            "=r,r",
            [tl.full([], _POLL_NANOSECONDS, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

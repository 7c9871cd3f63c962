"""A copy by few multiprocessors: in place of the copy engine, or at a given rate, to stand for a
link on one GPU, whose own memory is far faster than any link."""

import torch
import triton
import triton.language as tl

from sidp_sgl.kernels.clock import INTERPRETED, is_kernel, now, pause

PROGRAMS = 16  # multiprocessors that the copy takes
_WORDS = 8192  # 32-bit words of one piece


@triton.jit
def _copy(
    target, source, num_words, bytes_per_second, PROGRAMS: tl.constexpr, WORDS: tl.constexpr,
    CLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, WORDS)
    start = now(tl.full([], 0, tl.int64), CLOCK)
    first = tl.program_id(0).to(tl.int64) * WORDS
    for begin in range(first, num_words, PROGRAMS * WORDS):
        if CLOCK:  # noqa: SIM102 (known when compiled; `and` would not be)
            if bytes_per_second > 0:
                # All programs keep to one timetable: a piece starts when the link is through
                # with the bytes before it.
                due = (begin * 4.0 / bytes_per_second * 1e9).to(tl.int64)
                while now(due, CLOCK) - start < due:
                    pause(CLOCK)
        words = begin + lane
        inside = words < num_words
        tl.store(target + words, tl.load(source + words, mask=inside), mask=inside)


def copy(
    target: torch.Tensor,
    source: torch.Tensor,
    bytes_per_second: float = 0.0,
    programs: int = PROGRAMS,
) -> None:
    """Copy `source` into `target` (both [num_bytes] uint8, a multiple of 4 bytes, aligned to 16)
    with `programs` multiprocessors; no faster than `bytes_per_second` unless that is 0."""
    assert target.numel() == source.numel() and target.numel() % 4 == 0
    if not is_kernel(target):
        copy_reference(target, source, bytes_per_second, programs)
        return
    num_words = target.numel() // 4
    _copy[(programs,)](
        target.view(torch.int32),
        source.view(torch.int32),
        num_words,
        float(bytes_per_second),
        PROGRAMS=programs,
        WORDS=_WORDS,
        CLOCK=not INTERPRETED,
        num_warps=8,
    )


def copy_reference(
    target: torch.Tensor,
    source: torch.Tensor,
    bytes_per_second: float = 0.0,
    programs: int = PROGRAMS,
) -> None:
    target.copy_(source)

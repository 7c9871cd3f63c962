"""A copy by few multiprocessors, in place of the copy engine; and copies at a given rate, to stand
for a link on one GPU, whose own memory is far faster than any link."""

import time

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


@triton.jit
def _mark(clock, CLOCK: tl.constexpr):
    tl.store(clock, now(tl.full([], 0, tl.int64), CLOCK))


@triton.jit
def _until(clock, nanoseconds, CLOCK: tl.constexpr):
    start = tl.load(clock)
    elapsed = now(start + nanoseconds, CLOCK) - start
    while (elapsed >= 0) & (elapsed < nanoseconds):  # never long, whatever lies in `clock`
        pause(CLOCK)
        elapsed = now(start + nanoseconds, CLOCK) - start


def mark(clock: torch.Tensor) -> None:
    """Write the time into `clock` ([1] int64), after all earlier work of the stream."""
    if is_kernel(clock):
        _mark[(1,)](clock, CLOCK=not INTERPRETED, num_warps=1)
    else:
        mark_reference(clock)


def wait_until(clock: torch.Tensor, seconds: float) -> None:
    """Let later work of the stream wait until `seconds` after the latest `mark`."""
    if is_kernel(clock):
        _until[(1,)](clock, int(seconds * 1e9), CLOCK=not INTERPRETED, num_warps=1)
    else:
        wait_until_reference(clock, seconds)


def mark_reference(clock: torch.Tensor) -> None:
    clock.fill_(time.monotonic_ns())


def wait_until_reference(clock: torch.Tensor, seconds: float) -> None:
    time.sleep(max(0.0, seconds - (time.monotonic_ns() - int(clock)) / 1e9))


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

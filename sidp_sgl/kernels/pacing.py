"""Holds a stream to a timetable: copies at a given rate stand for a link on one GPU, whose own
memory is far faster than any link."""

import time

import torch
import triton
import triton.language as tl

from sidp_sgl.kernels.clock import INTERPRETED, is_kernel, now, pause


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

"""Signals between ranks on the device: a counter that one side adds to and the other waits for.

The counter lies in the memory of the side that waits, which looks at its own memory only. Counters
instead of values: a captured kernel's arguments never change, so what it waits for must lie in
memory. Every wait is bounded: it sets an error word, which the host looks at once per step, and
lets the stream go on.
"""

import time

import torch
import triton
import triton.language as tl

from sidp_sgl.kernels.clock import INTERPRETED, is_kernel, now, pause

POLLS = 200  # bound of a wait under the interpreter, which has no clock


@triton.jit
def _signal(counter):
    # Release, of everything before it in the stream, to the whole system.
    tl.atomic_add(counter, 1, sem="release", scope="sys")


@triton.jit
def _wait(counter, seen, error, code, bound, CLOCK: tl.constexpr):
    target = tl.load(seen) + 1
    polls = target * 0
    start = now(polls, CLOCK)
    value = tl.atomic_add(counter, 0, sem="acquire", scope="sys")
    waiting = value < target
    while waiting:
        pause(CLOCK)
        polls += 1
        value = tl.atomic_add(counter, 0, sem="acquire", scope="sys")
        waiting = (value < target) & (now(polls, CLOCK) - start < bound)
    if value < target:
        none = target * 0
        tl.atomic_cas(error, none, none + code, sem="release", scope="sys")  # the first stays
    else:
        tl.store(seen, target)


def signal(counter: torch.Tensor) -> None:
    """Add one to `counter` ([1] int64, may lie on a peer), after all earlier work of the stream."""
    if is_kernel(counter):
        _signal[(1,)](counter, num_warps=1)
    else:
        signal_reference(counter)


def wait(
    counter: torch.Tensor, seen: torch.Tensor, error: torch.Tensor, code: int, seconds: float
) -> None:
    """Let later work of the stream wait until `counter` exceeds `seen`, and add one to `seen`.

    `counter`, `seen`, `error`: [1] int64. After `seconds` without it, `error` becomes `code`
    (unless it holds one already), `seen` stays, and the stream goes on.
    """
    if is_kernel(counter):
        bound = POLLS if INTERPRETED else int(seconds * 1e9)
        _wait[(1,)](counter, seen, error, code, bound, CLOCK=not INTERPRETED, num_warps=1)
    else:
        wait_reference(counter, seen, error, code, seconds)


def signal_reference(counter: torch.Tensor) -> None:
    counter += 1


def wait_reference(
    counter: torch.Tensor, seen: torch.Tensor, error: torch.Tensor, code: int, seconds: float
) -> None:
    deadline = time.monotonic() + seconds
    while counter.item() <= seen.item():
        if time.monotonic() > deadline:
            if error.item() == 0:
                error.fill_(code)
            return
        time.sleep(10e-6)
    seen += 1

"""A ticket lock in an owner's memory: it serves one reader at a time, first come, first served.

A reader draws a ticket from a counter and polls that ticket's own entry of a ring until it says
"granted"; a release grants the next ticket. The lock only makes fetches faster, so nobody waits for
ever: a reader that saw no release for a while gives its ticket back and goes on without the lock.
Grant and return of one ticket are compare-and-swap on the same entry, so that exactly one of them
happens, and the lock is neither lost nor granted twice.

An entry holds 2·ticket + 1 for "granted" and 2·ticket for "given back"; anything else is of an
earlier round of the ring.
"""

import threading
import time

import torch
import triton
import triton.language as tl

from sidp_sgl.kernels.clock import INTERPRETED, is_kernel, now, pause

RING = 128  # tickets that may be outstanding, and then some
LOCK_SIZE = 2 + RING  # int64: next ticket, latest grant, ring
READER_SIZE = 3  # int64: own ticket (0: none), the grant at which time ran out, fetches without
POLLS = 200  # bound of a wait under the interpreter, which has no clock
_RING = tl.constexpr(RING)
_atomic = threading.Lock()  # the reference is atomic between the threads of one process


def reset(lock: torch.Tensor) -> None:
    """Make `lock` ([LOCK_SIZE] int64) a lock that nobody holds: ticket 1 is granted."""
    lock.zero_()
    lock[0], lock[1], lock[2 + 1 % RING] = 1, 1, 3


# The lock may lie on a peer, whose pointers Triton can't look up: it comes as a number.


@triton.jit
def _acquire(lock_address, reader, timeout, CLOCK: tl.constexpr):
    lock = lock_address.to(tl.pointer_type(tl.int64))
    serving = tl.atomic_add(lock + 1, 0, sem="acquire", scope="sys")
    drawn = tl.atomic_add(lock, 0, sem="acquire", scope="sys")
    ticket = serving * 0
    if (serving != tl.load(reader + 1)) & (drawn - serving < _RING // 2):
        ticket = tl.atomic_add(lock, 1, sem="acq_rel", scope="sys")
        entry = lock + 2 + ticket % _RING
        polls = ticket * 0
        start = now(polls, CLOCK)
        value = tl.atomic_add(entry, 0, sem="acquire", scope="sys")
        waiting = value != 2 * ticket + 1
        while waiting:
            pause(CLOCK)
            polls += 1
            value = tl.atomic_add(entry, 0, sem="acquire", scope="sys")
            latest = tl.atomic_add(lock + 1, 0, sem="acquire", scope="sys")
            if latest != serving:  # somebody has released it
                serving = latest
                start = now(polls, CLOCK)
            waiting = (value != 2 * ticket + 1) & (now(polls, CLOCK) - start < timeout)
        if value != 2 * ticket + 1:  # noqa: SIM102 (`and` would swap in any case)
            if tl.atomic_cas(entry, value, 2 * ticket, sem="acq_rel", scope="sys") == value:
                ticket = ticket * 0
                tl.store(reader + 1, serving)
    tl.store(reader, ticket)
    if ticket == 0:
        tl.store(reader + 2, tl.load(reader + 2) + 1)


@triton.jit
def _release(lock_address, reader):
    lock = lock_address.to(tl.pointer_type(tl.int64))
    ticket = tl.load(reader)
    if ticket > 0:
        following = ticket + 1
        searching = ticket > 0
        while searching:
            entry = lock + 2 + following % _RING
            value = tl.atomic_add(entry, 0, sem="acquire", scope="sys")
            if value == 2 * following:  # given back
                following += 1
            else:
                granted = 2 * following + 1
                swapped = tl.atomic_cas(entry, value, granted, sem="acq_rel", scope="sys")
                searching = swapped != value
        tl.atomic_max(lock + 1, following, sem="release", scope="sys")
        tl.store(reader, ticket * 0)


def acquire(lock: torch.Tensor, reader: torch.Tensor, seconds: float) -> None:
    """Let later work of the stream wait for the lock, or for `seconds` without a release.

    `lock`: [LOCK_SIZE] int64, may lie on a peer; `reader`: [READER_SIZE] int64, one per pair of
    reader and lock. reader[0] says whether the lock is held.
    """
    if is_kernel(lock):
        timeout = POLLS if INTERPRETED else int(seconds * 1e9)
        _acquire[(1,)](lock.data_ptr(), reader, timeout, CLOCK=not INTERPRETED, num_warps=1)
    else:
        acquire_reference(lock, reader, seconds)


def release(lock: torch.Tensor, reader: torch.Tensor) -> None:
    """Grant the lock to the next reader, if this one holds it, after all earlier work of the
    stream."""
    if is_kernel(lock):
        _release[(1,)](lock.data_ptr(), reader, num_warps=1)
    else:
        release_reference(lock, reader)


def acquire_reference(lock: torch.Tensor, reader: torch.Tensor, seconds: float) -> None:
    reader[0] = 0
    with _atomic:
        drawn, serving = int(lock[0]), int(lock[1])
        may_draw = serving != int(reader[1]) and drawn - serving < RING // 2
        if may_draw:
            lock[0] += 1
    if not may_draw:
        reader[2] += 1
        return
    entry, deadline = lock[2 + drawn % RING :][:1], time.monotonic() + seconds
    while int(entry) != 2 * drawn + 1:
        if int(lock[1]) != serving:
            serving, deadline = int(lock[1]), time.monotonic() + seconds
        if time.monotonic() > deadline:
            with _atomic:
                if int(entry) != 2 * drawn + 1:
                    entry.fill_(2 * drawn)
                    reader[1] = serving
                    reader[2] += 1
                    return
            break
        time.sleep(10e-6)
    reader[0] = drawn


def release_reference(lock: torch.Tensor, reader: torch.Tensor) -> None:
    ticket = int(reader[0])
    if ticket == 0:
        return
    with _atomic:
        following = ticket + 1
        while int(lock[2 + following % RING]) == 2 * following:
            following += 1
        lock[2 + following % RING] = 2 * following + 1
        lock[1] = max(int(lock[1]), following)
    reader[0] = 0

"""Turns at an owner: it serves one reader at a time, first come, first served.

A reader draws a ticket from a counter in the owner's memory and looks at that ticket's own word
until it says "granted"; whoever ends a turn grants the next ticket. Turns only make fetches
faster, so nobody waits for ever: a reader that saw no turn end for a while gives its ticket back
and goes on without. Grant and return of one ticket are compare-and-swap on the same word, so that
exactly one of them happens, and a turn is neither lost nor given twice.

A word holds 2·ticket + 1 for "granted" and 2·ticket for "given back"; anything else is of an
earlier round of the ring.
"""

import threading
import time

import torch
import triton
import triton.language as tl

from sidp_sgl.kernels.clock import INTERPRETED, is_kernel, now, pause
from sidp_sgl.kernels.flags import POLLS

RING = 128  # tickets that may be outstanding, and then some
OWNER_WORDS = 2 + RING  # next ticket, latest grant, ring; int64, in the owner's memory
READER_WORDS = 3  # own ticket (0: no turn), the grant at which patience ran out, skipped turns
_RING = tl.constexpr(RING)
_lock = threading.Lock()  # the reference is atomic between the threads of one process


def reset(owner: torch.Tensor) -> None:
    """Make `owner` ([OWNER_WORDS] int64) an owner that serves nobody: ticket 1 is granted."""
    owner.zero_()
    owner[0], owner[1], owner[2 + 1 % RING] = 1, 1, 3


@triton.jit
def _take(owner, reader, patience, CLOCK: tl.constexpr):
    serving = tl.atomic_add(owner + 1, 0, sem="acquire", scope="sys")
    drawn = tl.atomic_add(owner, 0, sem="acquire", scope="sys")
    ticket = serving * 0
    if (serving != tl.load(reader + 1)) & (drawn - serving < _RING // 2):
        ticket = tl.atomic_add(owner, 1, sem="acq_rel", scope="sys")
        word = owner + 2 + ticket % _RING
        polls = ticket * 0
        start = now(polls, CLOCK)
        value = tl.atomic_add(word, 0, sem="acquire", scope="sys")
        waiting = value != 2 * ticket + 1
        while waiting:
            pause(CLOCK)
            polls += 1
            value = tl.atomic_add(word, 0, sem="acquire", scope="sys")
            latest = tl.atomic_add(owner + 1, 0, sem="acquire", scope="sys")
            if latest != serving:  # a turn has ended
                serving = latest
                start = now(polls, CLOCK)
            waiting = (value != 2 * ticket + 1) & (now(polls, CLOCK) - start < patience)
        if value != 2 * ticket + 1:  # noqa: SIM102 (`and` would swap in any case)
            if tl.atomic_cas(word, value, 2 * ticket, sem="acq_rel", scope="sys") == value:
                ticket = ticket * 0
                tl.store(reader + 1, serving)
    tl.store(reader, ticket)
    if ticket == 0:
        tl.store(reader + 2, tl.load(reader + 2) + 1)


@triton.jit
def _end(owner, reader):
    ticket = tl.load(reader)
    if ticket > 0:
        following = ticket + 1
        searching = ticket > 0
        while searching:
            word = owner + 2 + following % _RING
            value = tl.atomic_add(word, 0, sem="acquire", scope="sys")
            if value == 2 * following:  # given back
                following += 1
            else:
                swapped = tl.atomic_cas(word, value, 2 * following + 1, sem="acq_rel", scope="sys")
                searching = swapped != value
        tl.atomic_max(owner + 1, following, sem="release", scope="sys")
        tl.store(reader, ticket * 0)


def take_turn(owner: torch.Tensor, reader: torch.Tensor, seconds: float) -> None:
    """Let later work of the stream wait for this reader's turn, or for `seconds` in which no turn
    ends. `owner`: [OWNER_WORDS] int64, may lie on a peer; `reader`: [READER_WORDS] int64, one per
    pair of reader and owner. reader[0] says whether the turn was taken."""
    if is_kernel(owner):
        patience = POLLS if INTERPRETED else int(seconds * 1e9)
        _take[(1,)](owner, reader, patience, CLOCK=not INTERPRETED, num_warps=1)
    else:
        take_turn_reference(owner, reader, seconds)


def end_turn(owner: torch.Tensor, reader: torch.Tensor) -> None:
    """Grant the next turn, if this reader has one, after all earlier work of the stream."""
    if is_kernel(owner):
        _end[(1,)](owner, reader, num_warps=1)
    else:
        end_turn_reference(owner, reader)


def take_turn_reference(owner: torch.Tensor, reader: torch.Tensor, seconds: float) -> None:
    reader[0] = 0
    with _lock:
        drawn, serving = int(owner[0]), int(owner[1])
        may_draw = serving != int(reader[1]) and drawn - serving < RING // 2
        if may_draw:
            owner[0] += 1
    if not may_draw:
        reader[2] += 1
        return
    word, deadline = owner[2 + drawn % RING :][:1], time.monotonic() + seconds
    while int(word) != 2 * drawn + 1:
        if int(owner[1]) != serving:
            serving, deadline = int(owner[1]), time.monotonic() + seconds
        if time.monotonic() > deadline:
            with _lock:
                if int(word) != 2 * drawn + 1:
                    word.fill_(2 * drawn)
                    reader[1] = serving
                    reader[2] += 1
                    return
            break
        time.sleep(10e-6)
    reader[0] = drawn


def end_turn_reference(owner: torch.Tensor, reader: torch.Tensor) -> None:
    ticket = int(reader[0])
    if ticket == 0:
        return
    with _lock:
        following = ticket + 1
        while int(owner[2 + following % RING]) == 2 * following:
            following += 1
        owner[2 + following % RING] = 2 * following + 1
        owner[1] = max(int(owner[1]), following)
    reader[0] = 0

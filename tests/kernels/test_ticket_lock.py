"""The lock: one reader at a time, in order of arrival, and nobody is held up for ever."""

import multiprocessing
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.kernels import ticket_lock

READERS = 3
SECONDS = 1e-3


def make(device: torch.device | str, readers: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    lock = torch.empty(ticket_lock.LOCK_SIZE, dtype=torch.int64, device=device)
    ticket_lock.reset(lock)
    size = ticket_lock.READER_SIZE
    return lock, [torch.zeros(size, dtype=torch.int64, device=device) for _ in range(readers)]


STEPS = st.lists(st.tuples(st.sampled_from(["acquire", "release"]), st.integers(0, READERS - 1)))


def check_same(device: torch.device, steps: list[tuple[str, int]]) -> None:
    """Kernel and reference leave the same numbers behind after every step."""
    lock, readers = make(device, READERS)
    lock_reference, readers_reference = make("cpu", READERS)
    holders: set[int] = set()
    for what, number in steps:
        if what == "acquire" and number not in holders:
            ticket_lock.acquire(lock, readers[number], SECONDS)
            ticket_lock.acquire_reference(lock_reference, readers_reference[number], 0.0)
        elif what == "release":
            ticket_lock.release(lock, readers[number])
            ticket_lock.release_reference(lock_reference, readers_reference[number])
        assert torch.equal(lock.cpu(), lock_reference)
        for ours, theirs in zip(readers, readers_reference, strict=True):
            assert torch.equal(ours.cpu(), theirs)
        holders = {n for n, reader in enumerate(readers) if int(reader[0])}
        assert len(holders) <= 1, "two readers at a time"


def test_kernels_do_what_the_references_do(device: torch.device) -> None:
    given(STEPS)(lambda steps: check_same(device, steps))()


def test_it_can_be_acquired_again_and_again(device: torch.device) -> None:
    lock, (reader,) = make(device, 1)
    for ticket in range(1, 3 * ticket_lock.RING):
        if ticket > 4 and ticket % ticket_lock.RING not in (0, 1, 2):  # around the end of the ring
            ticket_lock.acquire_reference(lock, reader, 0.0)
            ticket_lock.release_reference(lock, reader)
            continue
        ticket_lock.acquire(lock, reader, SECONDS)
        assert int(reader[0]) == ticket
        ticket_lock.release(lock, reader)
    assert int(reader[2]) == 0, "never went on without"


def test_nobody_waits_for_a_holder_that_was_stopped(device: torch.device) -> None:
    lock, (stopped, reader, other) = make(device, 3)
    ticket_lock.acquire(lock, stopped, SECONDS)
    for waiter in (reader, other):
        ticket_lock.acquire(lock, waiter, SECONDS)
        assert (int(waiter[0]), int(waiter[2])) == (0, 1)
    drawn = int(lock[0])
    for _ in range(2 * ticket_lock.RING):
        ticket_lock.acquire_reference(lock, reader, 60.0)  # it must not wait a second time
    assert int(lock[0]) == drawn
    ticket_lock.release(lock, stopped)  # goes on: the tickets given back are passed over
    for waiter in (reader, other, stopped):
        ticket_lock.acquire(lock, waiter, SECONDS)
        assert int(waiter[0]) > 0
        ticket_lock.release(lock, waiter)


def test_a_release_by_another_does_nothing(device: torch.device) -> None:
    lock, (holder, reader) = make(device, 2)
    ticket_lock.acquire(lock, holder, SECONDS)
    before = lock.clone()
    ticket_lock.release(lock, reader)
    assert torch.equal(lock, before)


ROUNDS = 20


def _hammer(lock: torch.Tensor, shared: torch.Tensor, timeout: int) -> None:
    ticket_lock.POLLS = timeout
    reader = torch.zeros(ticket_lock.READER_SIZE, dtype=torch.int64)
    for _ in range(ROUNDS):
        ticket_lock.acquire(lock, reader, 10.0)
        if int(reader[0]):
            inside = int(shared[0]) + 1
            time.sleep(1e-3)
            shared[0] = inside  # lost where two are inside
            ticket_lock.release(lock, reader)
            shared[2:].view(-1)[int(inside)] = 1
        else:
            time.sleep(1e-3)
    with _lock:
        shared[1] += reader[2]


_lock = multiprocessing.get_context("fork").Lock()


@pytest.mark.skipif(torch.cuda.is_available(), reason="bench/gpu/verify.py does this on a GPU")
@pytest.mark.parametrize("timeout", [1_000_000, 20], ids=["patient", "impatient"])
def test_holders_exclude_each_other_between_processes(timeout: int) -> None:
    lock, _ = make("cpu", 0)
    shared = torch.zeros(200, dtype=torch.int64).share_memory_()  # inside, skipped, who was there
    lock = lock.share_memory_()
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_hammer, args=(lock, shared, timeout)) for _ in range(READERS)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    inside, skipped = int(shared[0]), int(shared[1])
    assert inside + skipped == READERS * ROUNDS
    assert timeout < 1000 or skipped == 0
    assert inside > 0

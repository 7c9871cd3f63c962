"""Turns: one reader at a time, in order of arrival, and nobody is held up for ever."""

import multiprocessing
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.kernels import tickets

READERS = 3
SECONDS = 1e-3


def make(device: torch.device | str, readers: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    owner = torch.empty(tickets.OWNER_WORDS, dtype=torch.int64, device=device)
    tickets.reset(owner)
    size = tickets.READER_WORDS
    return owner, [torch.zeros(size, dtype=torch.int64, device=device) for _ in range(readers)]


STEPS = st.lists(st.tuples(st.sampled_from(["take", "end"]), st.integers(0, READERS - 1)))


def check_same(device: torch.device, steps: list[tuple[str, int]]) -> None:
    """Kernel and reference leave the same words behind after every step."""
    owner, readers = make(device, READERS)
    owner_reference, readers_reference = make("cpu", READERS)
    has_turn: set[int] = set()
    for what, number in steps:
        if what == "take" and number not in has_turn:
            tickets.take_turn(owner, readers[number], SECONDS)
            tickets.take_turn_reference(owner_reference, readers_reference[number], 0.0)
        elif what == "end":
            tickets.end_turn(owner, readers[number])
            tickets.end_turn_reference(owner_reference, readers_reference[number])
        assert torch.equal(owner.cpu(), owner_reference)
        for ours, theirs in zip(readers, readers_reference, strict=True):
            assert torch.equal(ours.cpu(), theirs)
        has_turn = {n for n, reader in enumerate(readers) if int(reader[0])}
        assert len(has_turn) <= 1, "two readers at a time"


def test_kernels_do_what_the_references_do(device: torch.device) -> None:
    given(STEPS)(lambda steps: check_same(device, steps))()


def test_a_turn_can_be_taken_again_and_again(device: torch.device) -> None:
    owner, (reader,) = make(device, 1)
    for turn in range(1, 3 * tickets.RING):
        if turn > 4 and turn % tickets.RING not in (0, 1, 2):  # around the end of the ring
            tickets.take_turn_reference(owner, reader, 0.0)
            tickets.end_turn_reference(owner, reader)
            continue
        tickets.take_turn(owner, reader, SECONDS)
        assert int(reader[0]) == turn
        tickets.end_turn(owner, reader)
    assert int(reader[2]) == 0, "no turn was skipped"


def test_nobody_waits_for_a_reader_that_was_stopped_in_its_turn(device: torch.device) -> None:
    owner, (stopped, reader, other) = make(device, 3)
    tickets.take_turn(owner, stopped, SECONDS)
    for waiter in (reader, other):
        tickets.take_turn(owner, waiter, SECONDS)
        assert (int(waiter[0]), int(waiter[2])) == (0, 1)
    drawn = int(owner[0])
    for _ in range(2 * tickets.RING):
        tickets.take_turn_reference(owner, reader, 60.0)  # it must not wait a second time
    assert int(owner[0]) == drawn
    tickets.end_turn(owner, stopped)  # goes on: the tickets given back are passed over
    for waiter in (reader, other, stopped):
        tickets.take_turn(owner, waiter, SECONDS)
        assert int(waiter[0]) > 0
        tickets.end_turn(owner, waiter)


def test_ending_without_a_turn_does_nothing(device: torch.device) -> None:
    owner, (holder, reader) = make(device, 2)
    tickets.take_turn(owner, holder, SECONDS)
    before = owner.clone()
    tickets.end_turn(owner, reader)
    assert torch.equal(owner, before)


ROUNDS = 20


def _hammer(owner: torch.Tensor, shared: torch.Tensor, patience: int) -> None:
    tickets.POLLS = patience
    reader = torch.zeros(tickets.READER_WORDS, dtype=torch.int64)
    for _ in range(ROUNDS):
        tickets.take_turn(owner, reader, 10.0)
        if int(reader[0]):
            inside = int(shared[0]) + 1
            time.sleep(1e-3)
            shared[0] = inside  # lost where two are inside
            tickets.end_turn(owner, reader)
            shared[2:].view(-1)[int(inside)] = 1
        else:
            time.sleep(1e-3)
    with _lock:
        shared[1] += reader[2]


_lock = multiprocessing.get_context("fork").Lock()


@pytest.mark.skipif(torch.cuda.is_available(), reason="bench/gpu/verify.py does this on a GPU")
@pytest.mark.parametrize("patience", [1_000_000, 20], ids=["patient", "impatient"])
def test_turns_exclude_each_other_between_processes(patience: int) -> None:
    owner, _ = make("cpu", 0)
    shared = torch.zeros(200, dtype=torch.int64).share_memory_()  # inside, skipped, who was there
    owner = owner.share_memory_()
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_hammer, args=(owner, shared, patience)) for _ in range(READERS)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    inside, skipped = int(shared[0]), int(shared[1])
    assert inside + skipped == READERS * ROUNDS
    assert patience < 1000 or skipped == 0
    assert inside > 0

"""Signals: what a waiter sees and remembers, and that no wait lasts."""

import time

import torch
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.kernels import flags

SECONDS = 1e-3


def words(*values: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def test_kernels_do_what_the_references_do(device: torch.device) -> None:
    @given(st.lists(st.booleans(), max_size=8))
    def check(signals: list[bool]) -> None:
        ours = [words(0, device=device) for _ in range(3)]
        theirs = [words(0, device=torch.device("cpu")) for _ in range(3)]
        for number, is_signal in enumerate(signals, start=1):
            if is_signal:
                flags.signal(ours[0])
                flags.signal_reference(theirs[0])
            else:
                flags.wait(*ours, number, SECONDS)
                flags.wait_reference(*theirs, number, 0.0)
            assert [int(word) for word in ours] == [int(word) for word in theirs]

    check()


def test_every_signal_is_waited_for_once(device: torch.device) -> None:
    counter, seen, error = (words(0, device=device) for _ in range(3))
    for _ in range(3):
        flags.signal(counter)
    for _ in range(3):
        flags.wait(counter, seen, error, 5, SECONDS)
    assert (int(counter), int(seen), int(error)) == (3, 3, 0)


def test_a_wait_that_runs_out_sets_the_error_and_ends(device: torch.device) -> None:
    counter, seen, error = words(4, device=device), words(4, device=device), words(0, device=device)
    started = time.monotonic()
    flags.wait(counter, seen, error, 7, SECONDS)
    assert (int(seen), int(error)) == (4, 7)
    flags.wait(counter, seen, error, 8, SECONDS)
    assert int(error) == 7, "the first error stays"
    assert time.monotonic() - started < 60
    flags.signal(counter)
    flags.wait(counter, seen, error, 9, SECONDS)
    assert (int(seen), int(error)) == (5, 7)


def test_counters_are_64_bits_wide(device: torch.device) -> None:
    many = 2**40
    counter, seen, error = (
        words(many, device=device),
        words(many, device=device),
        words(0, device=device),
    )
    flags.signal(counter)
    flags.wait(counter, seen, error, 1, SECONDS)
    assert (int(counter), int(seen), int(error)) == (many + 1, many + 1, 0)

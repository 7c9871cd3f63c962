"""When a mode that is not in use is tried again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.scheduler.modes.policy import CAS, WAS
from sidp_sgl.scheduler.modes.retries import FIRST_WAIT, LONGEST_WAIT, PROVEN_STEPS, Retries


def due_steps(retries: Retries, mode: str, num_steps: int, batch_size: int = 8) -> list[int]:
    return [step for step in range(1, num_steps + 1) if retries.is_due(mode, batch_size)]


def test_ever_more_rarely() -> None:
    due = due_steps(Retries(), WAS, 20_000)
    waits = [later - earlier for earlier, later in zip([0, *due], due, strict=False)]
    assert waits[:4] == [FIRST_WAIT, 2 * FIRST_WAIT, 4 * FIRST_WAIT, 8 * FIRST_WAIT]
    assert waits[-1] == LONGEST_WAIT == max(waits)


def test_a_try_that_does_not_stay_does_not_bring_the_next_one_forward() -> None:
    retries = Retries()
    assert due_steps(retries, WAS, FIRST_WAIT) == [FIRST_WAIT]
    assert due_steps(retries, CAS, PROVEN_STEPS - 1) == []
    assert due_steps(retries, WAS, 2 * FIRST_WAIT) == [2 * FIRST_WAIT]


def test_a_mode_that_stayed_is_tried_again_soon() -> None:
    retries = Retries()
    due_steps(retries, WAS, 5000)
    due_steps(retries, CAS, PROVEN_STEPS)
    assert due_steps(retries, WAS, FIRST_WAIT) == [FIRST_WAIT]


@pytest.mark.parametrize("batch_size", [16, 64])
def test_another_batch_size_brings_the_next_one_forward(batch_size: int) -> None:
    retries = Retries()
    due_steps(retries, CAS, 1, 32)
    due_steps(retries, WAS, 5000, 32)
    assert due_steps(retries, WAS, FIRST_WAIT, 24) == [], "that is near"
    assert due_steps(retries, WAS, 1, batch_size) == [1]
    assert due_steps(retries, WAS, 7 * FIRST_WAIT, batch_size) == [
        2 * FIRST_WAIT,
        6 * FIRST_WAIT,
    ], "and then rarely again"


steps_in_a_row = st.tuples(st.sampled_from([WAS, CAS]), st.integers(1, 400), st.integers(1, 64))


@given(st.lists(steps_in_a_row, max_size=20))
def test_retries_are_never_closer_than_the_first_wait(runs: list[tuple[str, int, int]]) -> None:
    retries = Retries()
    since = 0
    for mode, num_steps, batch_size in runs:
        for _ in range(num_steps):
            since += 1
            if retries.is_due(mode, batch_size):
                assert since >= FIRST_WAIT
                since = 0

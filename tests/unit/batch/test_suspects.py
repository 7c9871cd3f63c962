"""Which line has ended an engine: any lines that do, any window, any order of answers."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.batch.suspects import ALONE, Suspects


class Simulation:
    """A job over lines 1 to `number`; an engine ends with the first poison that it comes to."""

    def __init__(self, number: int, poisons: set[int], window: int, seed: int = 0) -> None:
        self.suspects = Suspects()
        self.left = list(range(1, number + 1))
        self.poisons = poisons
        self.window = window
        self.num_ends = 0
        self.answered: set[int] = set()
        self.blamed: list[int] = []
        self._random = random.Random(seed)

    def run(self) -> None:
        while self.left:
            self.run_engine()

    def run_engine(self) -> None:
        in_flight: dict[int, None] = {}
        while True:
            for line in self.left:
                if line in in_flight:
                    continue
                if len(in_flight) == self.window or not self.suspects.may_join(line, in_flight):
                    break
                in_flight[line] = None
            if not in_flight:
                return
            line = self._random.choice(list(in_flight))
            if line in self.poisons:
                break
            del in_flight[line]
            self.left.remove(line)
            self.answered.add(line)
        self.num_ends += 1
        was_alone = self.suspects.runs_alone(min(in_flight))
        blamed = self.suspects.engine_ended(list(in_flight))
        assert (blamed is not None) == was_alone
        if blamed is not None:
            assert list(in_flight) == [blamed]
            self.blamed.append(blamed)
            self.left.remove(blamed)


@given(
    number=st.integers(1, 300),
    window=st.integers(1, 400),
    poisons=st.sets(st.integers(1, 300), max_size=20),
    seed=st.integers(0, 1000),
)
def test_every_poison_is_blamed_and_nobody_else(
    number: int, window: int, poisons: set[int], seed: int
) -> None:
    poisons = {line for line in poisons if line <= number}
    simulation = Simulation(number, poisons, window, seed)
    simulation.run()
    assert sorted(simulation.blamed) == sorted(poisons)
    assert simulation.answered == set(range(1, number + 1)) - poisons
    steps = 2 if window <= ALONE else 3  # in the window, in a group, alone
    assert simulation.num_ends <= steps * len(poisons)
    assert simulation.suspects.num_unexplained == 0


@pytest.mark.parametrize("window", [1, 16, 4096])
def test_lines_that_all_end_the_engine(window: int) -> None:
    simulation = Simulation(100, set(range(1, 101)), window)
    simulation.run()
    assert sorted(simulation.blamed) == list(range(1, 101))
    assert simulation.num_ends <= 2 * 100 + 10


def test_a_full_window() -> None:
    """One of 4,096 costs three ends, and no more than 64 at a time run alone or in a group."""
    suspects = Suspects()
    assert suspects.engine_ended(range(1, 4097)) is None
    assert suspects.ranges == [(1, 4096, 64)]
    assert suspects.engine_ended(range(65, 129)) is None
    assert suspects.ranges == [(65, 128, 1), (1, 4096, 64)]
    assert not suspects.may_join(66, [65])
    assert suspects.engine_ended([100]) == 100
    assert suspects.num_unexplained == 0
    assert not suspects.may_join(129, [128])  # not beside the last one that runs alone
    assert suspects.may_join(130, [129])
    assert not suspects.may_join(200, range(129, 129 + 64))
    assert not suspects.may_join(4097, [4096])
    assert suspects.may_join(4098, [4097])


def test_ends_that_no_line_has_caused_are_counted() -> None:
    """A rank that is killed now and then: nobody is blamed, but every end counts."""
    suspects = Suspects()
    for start in range(1, 1000, 100):
        assert suspects.engine_ended(range(start, start + 20)) is None
    assert suspects.num_unexplained == 10
    assert suspects.engine_ended([905]) == 905
    assert suspects.num_unexplained == 9  # that of lines 901 to 920 is explained now
    assert suspects.engine_ended([906]) == 906
    assert suspects.num_unexplained == 9
    assert suspects.engine_ended([]) is None  # while an engine starts
    assert suspects.num_unexplained == 10


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_groups_become_smaller_until_each_is_alone(first: int, number: int) -> None:
    suspects = Suspects()
    sizes = []
    while True:
        if suspects.engine_ended(range(first, first + number)) is not None:
            break
        number = suspects.ranges[0][2]
        sizes.append(number)
    assert sizes[-1] == 1 and len(sizes) <= 3
    assert sizes == sorted(sizes, reverse=True)


@given(
    poisons=st.sets(st.integers(1, 100), max_size=5),
    window=st.integers(1, 200),
    seed=st.integers(0, 100),
    kept_after=st.integers(0, 8),
)
def test_suspects_of_an_earlier_run(
    poisons: set[int], window: int, seed: int, kept_after: int
) -> None:
    """A job that is stopped after some engines goes on with what it knew."""
    simulation = Simulation(100, poisons, window, seed)
    for _ in range(kept_after):
        simulation.run_engine()
    simulation.suspects = Suspects(simulation.suspects.ranges)
    simulation.run()
    assert sorted(simulation.blamed) == sorted(poisons)
    assert simulation.num_ends <= 3 * len(poisons)
    assert simulation.suspects.num_unexplained == 0


def test_what_a_continued_run_did_not_count_is_not_taken_off() -> None:
    suspects = Suspects([(1, 16, 1)])
    assert suspects.engine_ended([3]) == 3
    assert suspects.num_unexplained == 0
    assert suspects.engine_ended([4], counts=False) == 4
    assert suspects.engine_ended(range(20, 30), counts=False) is None
    assert suspects.num_unexplained == 0
    assert suspects.engine_ended([25]) == 25
    assert suspects.num_unexplained == 0

"""The DP controller's policy: nothing lost, no rank idle while others queue, bounded imbalance."""

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from sidp_sgl.scheduler.dispatch.policy import (
    BACKLOG,
    IMBALANCE,
    Candidate,
    Dispatcher,
    choose_rank,
)
from sidp_sgl.scheduler.dispatch.prompts import prompt_key
from sidp_sgl.scheduler.dispatch.window import Queued
from sidp_sgl.scheduler.messages import RankState

KV = 200
MAX_RUNNING = 8


@dataclass
class SimulatedRank:
    """Admits in order while prompt and output fit; one token per request and step."""

    rank: int
    waiting: list[Queued] = field(default_factory=list)
    running: list[list] = field(default_factory=list)  # request, tokens left
    received: int = 0

    def receive(self, queued: Queued) -> None:
        self.received += 1
        self.waiting.append(queued)

    def step(self) -> list[int]:
        """Numbers of those that finish."""
        while self.waiting and len(self.running) < MAX_RUNNING:
            queued = self.waiting[0]
            if self.used() + queued.prompt_tokens + queued.output_tokens > KV:
                break
            self.running.append([queued, queued.output_tokens])
            self.waiting.pop(0)
        for entry in self.running:
            entry[1] -= 1
        done = [queued.number for queued, left in self.running if left <= 0]
        self.running = [entry for entry in self.running if entry[1] > 0]
        return done

    def used(self) -> int:
        return sum(queued.prompt_tokens + queued.output_tokens for queued, _ in self.running)

    def give_back(self, count: int) -> list[Queued]:
        given = [self.waiting.pop() for _ in range(min(count, len(self.waiting)))]
        self.received -= len(given)
        return given

    def state(self) -> RankState:
        return RankState(
            self.rank, len(self.running), len(self.waiting), self.received,
            MAX_RUNNING, KV, KV - self.used(),
        )  # fmt: skip


def request(number: int, prompt: list[int], output: int) -> Queued:
    return Queued(number, prompt_key(prompt), len(prompt), output, None)


requests = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 40), st.integers(0, 3)),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(requests, st.integers(2, 4), st.booleans(), st.randoms(use_true_random=False))
def test_every_request_is_served_once_and_no_rank_idles(
    drawn: list[tuple[int, int, int, int]], num_ranks: int, is_job: bool, random_: random.Random
) -> None:
    """States arrive late, in any order of ranks; `drawn`: header, its length, output, delay. On a
    server nobody is overtaken by more than half as many as run."""
    dispatcher = Dispatcher(num_ranks, is_job)
    ranks = [SimulatedRank(n) for n in range(num_ranks)]
    sent: list[int] = []
    arrivals = [(sum(d[3] for d in drawn[: n + 1]), n) for n in range(len(drawn))]
    finished: list[int] = []
    time = idle_while_waiting = 0
    while len(finished) < len(drawn):
        time += 1
        assert time < 5000, "somebody waits for ever"
        for _, n in [each for each in arrivals if each[0] == time - 1]:
            header, length, output, _ = drawn[n]
            dispatcher.window.add(request(n, [header] * length + [n], output))
        for rank, queued in dispatcher.assign():
            ranks[rank].receive(queued)
            sent.append(queued.number)
        for rank, count in dispatcher.recalls():
            for queued in ranks[rank].give_back(count):
                dispatcher.take_back(rank, queued)
        for each in ranks:
            finished += each.step()
        idle = [r for r in ranks if not r.running and not r.waiting]
        queue = len(dispatcher.window) + sum(len(r.waiting) for r in ranks)
        idle_while_waiting = idle_while_waiting + 1 if idle and queue else 0
        assert idle_while_waiting <= 4, "a rank idles while requests wait"
        for each in random_.sample(ranks, len(ranks)):
            dispatcher.update(each.state())
    assert sorted(finished) == list(range(len(drawn)))
    assert dispatcher.sent == len(drawn)
    if not is_job and not dispatcher.moved:
        for place, number in enumerate(sent):
            overtakers = sum(later > number for later in sent[:place])
            assert overtakers < max(1, num_ranks * MAX_RUNNING // 2)


candidates = st.lists(
    st.builds(Candidate, st.integers(0, 7), st.integers(0, 50), st.integers(0, 500), st.integers()),
    min_size=1,
    unique_by=lambda candidate: candidate.rank,
)


@given(candidates)
def test_the_longest_prefix_wins_within_the_bound(found: list[Candidate]) -> None:
    least = min(candidate.load for candidate in found)
    chosen = next(t for t in found if t.rank == choose_rank(found, least))
    bound = least + max(IMBALANCE, least // 4)
    assert chosen.load <= bound
    near = [candidate for candidate in found if candidate.load <= bound]
    assert chosen.shared_tokens // 16 == max(candidate.shared_tokens // 16 for candidate in near)


def test_without_a_state_a_rank_gets_a_backlog_only() -> None:
    dispatcher = Dispatcher(2, is_job=True)
    for number in range(10):
        dispatcher.window.add(request(number, [number], 5))
    assert len(list(dispatcher.assign())) == 2 * BACKLOG
    assert len(dispatcher.window) == 10 - 2 * BACKLOG


def test_what_waits_at_a_full_rank_is_called_back_for_an_idle_one() -> None:
    dispatcher = Dispatcher(2, is_job=True)
    full, idle = SimulatedRank(0), SimulatedRank(1)
    for number in range(4):
        queued = request(number, [1] * 60, 60)
        dispatcher.send(0, queued)
        full.receive(queued)
    full.step()
    for _ in range(2):  # they wait through a whole step
        dispatcher.update(full.state())
        dispatcher.update(idle.state())
    ((rank, count),) = dispatcher.recalls()
    assert (rank, count) == (0, 2)
    assert not list(dispatcher.recalls()), "asked once"
    for queued in full.give_back(count):
        dispatcher.take_back(rank, queued)
    assert {rank for rank, _ in dispatcher.assign()} == {1}
    assert dispatcher.moved == 2


def test_what_was_called_back_does_not_follow_its_prefix_back() -> None:
    """A rank with one waiting request could take a second, and has seen its prompt."""
    dispatcher = Dispatcher(2, is_job=True)
    full, idle = SimulatedRank(0), SimulatedRank(1)
    for number in range(3):
        queued = request(number, [number] * 150, 40)
        dispatcher.send(0, queued)
        full.receive(queued)
    full.step()
    for _ in range(2):
        dispatcher.update(full.state())
        dispatcher.update(idle.state())
    ((rank, count),) = dispatcher.recalls()
    for queued in full.give_back(count):
        dispatcher.take_back(rank, queued)
    dispatcher.update(full.state())
    assert [rank for rank, _ in dispatcher.assign()] == [1]


def test_a_short_request_on_a_busy_server_waits_for_those_it_found() -> None:
    """Forty clients of long outputs, each of which asks again; then a short one."""
    dispatcher, ranks = Dispatcher(2, is_job=False), [SimulatedRank(0), SimulatedRank(1)]
    for number in range(40):
        dispatcher.window.add(request(number, [number], 20))
    number, found, sent = 40, 0, 0
    for step in range(2000):
        if step == 500:
            found = len(dispatcher.window)
            dispatcher.window.add(request(1_000_000, [7], 2))
        for rank, queued in dispatcher.assign():
            ranks[rank].receive(queued)
            sent += step >= 500
            if queued.number == 1_000_000:
                assert found - 8 <= sent <= found + 8, "half of the sixteen that run"
                return
        for each in ranks:
            for _ in each.step():
                dispatcher.window.add(request(number, [number], 20))
                number += 1
            dispatcher.update(each.state())
    raise AssertionError("it starves")

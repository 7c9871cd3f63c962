"""What must hold of every simulated job, whatever its lengths, ranks and settings."""

import random
from dataclasses import asdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.simulator import Lengths, Report, Settings, simulate
from bench.simulator.costs import layered_step
from bench.simulator.job import Request
from bench.simulator.rank_queue import RankQueue
from sidp_sgl.planner.time_model import Work
from tests.unit.bench.simulator.simulated import deployment, request, requests_of, sidp

METHODS = ["round_robin", "total_requests", "total_tokens"]


def check(report: Report, requests: list[Request]) -> None:
    """Every request finishes once, tokens add up, KV is never exceeded."""
    assert [r.number for r in report.requests] == [r.number for r in requests]
    assert sum(rank.finished for rank in report.ranks) == len(requests)
    assert report.output_tokens == sum(r.output_len for r in requests)
    prompts = sum(r.input_len for r in requests)
    again = sum(rank.prefill_tokens for rank in report.ranks) - prompts
    assert again >= 0 and (again > 0) == (report.retractions > 0)
    assert report.retractions == sum(r.retractions for r in report.requests)
    for after, before in zip(report.requests, requests, strict=True):
        assert before.finish < 0  # the caller's requests stay as they are
        assert after.arrival < after.first_token <= after.finish <= report.makespan
    for rank in report.ranks:
        assert rank.kv_peak <= rank.kv_capacity
        assert rank.busy_seconds <= report.makespan * (1 + 1e-9)
    assert 0 <= report.idle_share <= 1 and 0 <= report.kv_use <= 1


LENGTHS = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 20))


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(LENGTHS, max_size=25),
    capacity=st.integers(85, 300),
    ranks=st.integers(1, 3),
    chunk=st.integers(1, 64),
    ignore_eos=st.booleans(),
    method=st.sampled_from(METHODS),
    gap=st.floats(0, 3),
)
def test_plain_jobs(
    lengths: list[tuple[int, int, int]],
    capacity: int,
    ranks: int,
    chunk: int,
    ignore_eos: bool,
    method: str,
    gap: float,
) -> None:
    requests = [
        request(number, prompt, output, number * gap, output + more)
        for number, (prompt, output, more) in enumerate(lengths)
    ]
    flags = Settings(chunk, ignore_eos, load_balance_method=method, group_balance_method=method)
    report = simulate(deployment(capacity, ranks), requests, 2, flags)
    check(report, requests)
    if ignore_eos and all(more == 0 for _, _, more in lengths):
        assert report.retractions == 0


@settings(max_examples=100, deadline=None)
@given(
    num_requests=st.integers(1, 60),
    mode=st.sampled_from(["was", "cas", "auto"]),
    link=st.floats(1e4, 1e9),
    rate=st.one_of(st.none(), st.floats(0.5, 20)),
    seed=st.integers(0, 5),
)
def test_sidp_jobs(
    num_requests: int, mode: str, link: float, rate: float | None, seed: int
) -> None:
    requests = requests_of(num_requests, 20, 20, rate, seed)
    report = simulate(sidp(300, 4, mode, link=link), requests, settings=Settings(jitter=0.1))
    check(report, requests)
    assert report.steps("local") == 0
    assert mode != "was" or report.steps("cas") == report.mode_switches == 0


def contents(report: Report) -> object:
    ranks, requests = (
        [asdict(each) for each in items] for items in (report.ranks, report.requests)
    )
    return report.makespan, ranks, requests


def test_the_same_seed_gives_the_same_report() -> None:
    group, flags = sidp(300, 4, link=1e6), Settings(jitter=0.1)

    def run(seed: int) -> object:
        return contents(simulate(group, requests_of(60, 20, 20, 5.0, seed), 2, flags, seed))

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_jitter_has_a_seed_of_its_own() -> None:
    requests = requests_of(20, 20, 20)
    first, second, third = (
        simulate(deployment(300), requests, settings=Settings(jitter=0.1), seed=seed).makespan
        for seed in (1, 1, 2)
    )
    assert first == second != third


@pytest.mark.parametrize("seed", range(4))
def test_more_kv_is_never_slower(seed: int) -> None:
    """Where a step takes the same for any batch; up to what late stragglers happen to cost."""
    requests = requests_of(200, 30, 30, seed=seed)
    speeds = [
        simulate(deployment(tokens, 2), requests).tokens_per_second
        for tokens in (300, 600, 1200, 2400, 4800)
    ]
    for less, more in pairwise(speeds):
        assert more >= 0.97 * less
    assert speeds[-1] > 2 * speeds[0]


def test_equal_groups_do_as_well_as_one() -> None:
    requests = requests_of(64, 20, 20)
    one = simulate(deployment(4800, 4), requests)
    many = simulate(deployment(4800, 1), requests, num_groups=4)
    assert many.makespan == pytest.approx(one.makespan)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=20),
    capacity=st.integers(85, 200),
    chunk=st.integers(1, 64),
)
def test_queue_counts_its_tokens(
    lengths: list[tuple[int, int, int]], capacity: int, chunk: int
) -> None:
    """KV tokens step by step, counted anew from the requests' progress."""
    queue = RankQueue(capacity, 1000, chunk, ignore_eos=False)
    done: list[Request] = []
    for number, (prompt, output, more) in enumerate(lengths):
        queue.submit(request(number, prompt, output, limit=output + more))
    for _ in range(10_000):
        if queue.begin_prefill() is not None:
            done += queue.end_prefill()[1]
        elif queue.batch:
            queue.begin_decode()
            done += queue.end_decode()
        else:
            break
        assert 0 <= queue.running_tokens <= queue.used <= capacity
    assert sorted(r.number for r in done) == list(range(len(lengths)))
    assert (queue.used, queue.running_tokens, queue.waiting_tokens, queue.batch) == (0, 0, 0, 0)


def test_distributions() -> None:
    for lengths in (
        Lengths("fixed", 100),
        Lengths("log-normal", 100, 0.7),
        Lengths("pareto", 100, 3.0),
    ):
        drawn = [lengths.sample(random.Random(n)) for n in range(4000)]
        assert sum(drawn) / len(drawn) == pytest.approx(100, rel=0.05)
    assert max(Lengths("pareto", 100, 1.5, 150).sample(random.Random(n)) for n in range(99)) == 150
    for wrong in (("normal", 5.0), ("fixed", 0.0), ("pareto", 5.0, 1.0), ("fixed", 9.0, 0.0, 8)):
        with pytest.raises(ValueError):
            Lengths(*wrong)


def test_steps_agree_with_layers() -> None:
    """A job's WaS steps, by the factor, against the same step layer by layer with jitter."""
    block = sidp(100, 4).group.blocks[0]
    work = Work.decode(1, 10)
    for seconds in (0.05, 0.2, 1.0):  # a fetch; a layer's compute is 1/8 s
        group = sidp(100, 4, "was", link=block / seconds)
        layered = layered_step(group, work, jitter=0.05, num_steps=20).all_ranks
        assert group.group.was_seconds(work) == pytest.approx(layered, rel=0.15)

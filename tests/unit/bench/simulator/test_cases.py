"""The simulator on cases that are small enough to be worked out by hand: a step lasts a second."""

import pytest

from bench.simulator import Settings, simulate
from bench.simulator.dispatch import Load
from sidp_sgl.planner.deployment import DP_ATTENTION
from tests.unit.bench.simulator.simulated import deployment, request, sidp


def finishes(report: object) -> list[float]:
    return [round(r.finish, 6) for r in report.requests]  # type: ignore[attr-defined]


def test_nothing_to_do() -> None:
    report = simulate(deployment(100), [])
    assert (report.makespan, report.tokens_per_second, report.idle_share) == (0, 0, 0)
    assert report.mean_batch == report.kv_use == 0


def test_one_request() -> None:
    """The prefill gives the first token, each decode step one more."""
    report = simulate(deployment(100), [request(0, 10, 4)])
    assert report.makespan == pytest.approx(4)
    assert report.requests[0].first_token == pytest.approx(1)
    rank = report.ranks[0]
    assert rank.steps == {"prefill": 1, "local": 3, "was": 0, "cas": 0}
    assert (rank.output_tokens, rank.prefill_tokens, rank.kv_peak) == (4, 10, 13)
    # 10 tokens in the prefill, then 11, 12 and 13.
    assert report.kv_use == pytest.approx((10 + 11 + 12 + 13) / 4 / 100)


def test_one_token_needs_no_decode_step() -> None:
    report = simulate(deployment(100), [request(0, 10, 1)])
    assert finishes(report) == [1]
    assert report.steps("local") == 0


def test_two_requests_share_steps() -> None:
    report = simulate(deployment(100), [request(0, 10, 3), request(1, 10, 5)])
    assert finishes(report) == [3, 5]
    assert report.mean_batch == pytest.approx((2 + 2 + 1 + 1) / 4)
    assert report.tokens_per_second == pytest.approx(8 / 5)


def test_a_late_request_waits_for_the_step_under_way_and_is_prefilled_first() -> None:
    report = simulate(deployment(100), [request(0, 10, 4), request(1, 10, 2, arrival=1.5)])
    # Steps: prefill 0, decode until 2, prefill 1 until 3, decode both until 4, decode 0 until 5.
    assert finishes(report) == [5, 4]


def test_an_idle_rank_wakes() -> None:
    report = simulate(deployment(100), [request(0, 10, 1), request(1, 10, 1, arrival=7.25)])
    assert finishes(report) == [1, 8.25]
    assert report.idle_share == pytest.approx(6.25 / 8.25)


def test_no_room_for_two() -> None:
    """With known lengths a request is admitted only where all of it fits."""
    settings = Settings(ignore_eos=True)
    report = simulate(deployment(25), [request(0, 10, 3), request(1, 10, 3)], settings=settings)
    assert finishes(report) == [3, 6]
    assert report.retractions == 0


def test_a_prompt_in_chunks() -> None:
    settings = Settings(chunked_prefill_size=4)
    report = simulate(deployment(100), [request(0, 10, 2), request(1, 3, 2)], settings=settings)
    # Passes of 4, 4, 2 + 2 (the second prompt cut) and 1 tokens, then one decode step for both.
    assert report.steps("prefill") == 4
    assert finishes(report) == [5, 5]
    assert report.ranks[0].prefill_tokens == 13


def test_max_running_requests() -> None:
    settings = Settings(max_running_requests=1)
    report = simulate(deployment(100), [request(n, 5, 2) for n in range(3)], settings=settings)
    assert finishes(report) == [2, 4, 6]


def test_retraction() -> None:
    """The second is let in, for of the first's 11 possible tokens 0.7 are reserved. After ten
    steps 29 tokens are in use: the second, with as many outputs and the longer prompt, goes back
    and is prefilled again, which gives its last token."""
    requests = [request(0, 4, 12), request(1, 5, 12, arrival=0.5)]
    report = simulate(deployment(30), requests)
    assert [r.retractions for r in report.requests] == [0, 1]
    assert finishes(report) == [13, 14]
    assert report.ranks[0].prefill_tokens == 4 + 5 + (5 + 11)
    assert report.output_tokens == 24
    assert simulate(deployment(29), requests).retractions == 0  # one token less: not let in


def test_round_robin_and_total_tokens() -> None:
    requests = [request(n, length, 1) for n, length in enumerate((50, 10, 10, 10))]
    plain = deployment(100, dp=2)
    settings = Settings(load_balance_method="total_tokens")
    assert [r.rank for r in simulate(plain, requests).requests] == [0, 1, 0, 1]
    assert [r.rank for r in simulate(plain, requests, settings=settings).requests] == [0, 1, 1, 1]


def test_groups_before_ranks() -> None:
    report = simulate(deployment(100, dp=2), [request(n, 1, 1) for n in range(5)], num_groups=2)
    assert [r.rank for r in report.requests] == [0, 2, 1, 3, 0]
    assert len(report.ranks) == 4


def test_a_streamed_step_takes_its_fetches() -> None:
    """A block of 8 takes 1 s; with four ranks six of eight are fetched."""
    block = sidp(100, 4).group.blocks[0]
    group = sidp(100, 4, "was", link=block)
    report = simulate(group, [request(0, 10, 4)])
    assert group.fetch_seconds() == pytest.approx(6)
    assert report.steps("was") == 3
    step = group.group.streamed_seconds(1.0)
    assert step >= 6
    assert report.makespan == pytest.approx(4 * step)


def test_a_lone_request_is_sent_where_fetches_take_longer() -> None:
    block = sidp(100, 4).group.blocks[0]
    report = simulate(sidp(100, 4, "auto", link=block), [request(0, 10, 4)])
    assert (report.steps("was"), report.steps("cas")) == (0, 3)
    assert report.was_share == pytest.approx(1 / 4)  # the prefill


def test_what_can_not_be() -> None:
    with pytest.raises(ValueError, match="do not fit into 100 KV tokens"):
        simulate(deployment(100), [request(0, 90, 20)])
    with pytest.raises(ValueError, match="does not know DP attention"):
        simulate(deployment(100, 2, DP_ATTENTION), [])
    with pytest.raises(ValueError, match="one group"):
        simulate(deployment(100), [], num_groups=0)
    with pytest.raises(ValueError, match="no such load balance method"):
        Settings(load_balance_method="random")


def test_a_groups_load_is_that_of_its_ranks() -> None:
    whole = Load()
    parts = [Load(whole), Load(whole)]
    parts[0].set(3, 100)
    parts[1].set(1, 50)
    parts[0].set(2, 70)
    assert (whole.num_requests, whole.num_tokens) == (3, 120)

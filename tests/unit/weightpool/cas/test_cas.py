"""Rows sent to owners: the right results, in their senders' hands, or a fallback in time."""

import threading
import time

import pytest
import torch

from sidp_sgl.weightpool.cas.endpoint import CasEndpoint
from sidp_sgl.weightpool.cas.mailbox import Call, Outcome
from sidp_sgl.weightpool.cas.staging import make_staging
from sidp_sgl.weightpool.cas.unit import PooledUnit, RowType, rows_view
from tests.support import cas
from tests.support.cas import (
    IN_WIDTH,
    OUT_WIDTH,
    connected_mailboxes,
    endpoints,
    make_rows,
    matmul_unit,
    settle,
    weight,
)
from tests.support.transports import KINDS

OWNERS = [0, 1, 2, 0, 1, 2]
UNITS = [matmul_unit(layer) for layer in range(len(OWNERS))]


@pytest.fixture(params=KINDS, autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cas, "KIND", request.param)
    return request.param


def call(group: CasEndpoint, unit: PooledUnit, rows: torch.Tensor) -> torch.Tensor | None:
    return group.requester.call([OWNERS[unit.block]], unit, [rows])


def test_owner_computes_what_the_requester_would_have() -> None:
    with endpoints(3, UNITS, OWNERS) as groups:
        for requester, group in enumerate(groups):
            group.requester.begin_step(7)
            for unit in UNITS:
                if OWNERS[unit.block] != requester:
                    rows = make_rows(7, seed=requester)
                    result = call(group, unit, rows)
                    assert result is not None
                    assert torch.equal(result, rows @ weight(unit.block))
        sent = sum(group.counters()["rows_sent"] for group in groups)
        served = sum(group.counters()["rows_served"] for group in groups)
        assert sent == served == 3 * 4 * 7
        assert all(group.counters()["fallbacks"] == 0 for group in groups)


def test_results_of_an_earlier_call_stay_as_they_are() -> None:
    with endpoints(2, UNITS[:2], [0, 1]) as groups:
        groups[0].requester.begin_step(4)
        first = groups[0].requester.call([1], UNITS[1], [make_rows(4, seed=1)])
        groups[0].requester.call([1], UNITS[1], [make_rows(4, seed=2)])
        assert first is not None
        assert torch.equal(first, make_rows(4, seed=1) @ weight(1))


def test_calls_for_one_unit_that_are_there_together_take_one_gemm() -> None:
    with endpoints(3, UNITS, OWNERS, start=False) as groups:
        for requester, num_rows in ((1, 3), (2, 5)):
            calls, staging = groups[requester].mailbox, groups[requester].requester.staging
            offset = staging.offset(0, requester)
            inbox = rows_view(calls.inbox_of(0), offset, num_rows, RowType(12, torch.float32))
            inbox.copy_(make_rows(num_rows, seed=requester))
            calls.send(0, UNITS[3].number, offset, num_rows)
        settle(groups)
        service = groups[0].service
        service.serve(groups[0].mailbox.receive(0.0))
        settle(groups)
        assert (service.counters.gemms, service.counters.fused_gemms) == (1, 1)
        assert (service.counters.calls, service.counters.rows_served) == (2, 8)
        for requester, num_rows in ((1, 3), (2, 5)):
            assert groups[requester].mailbox.wait(0, 0.0) is Outcome.DONE
            result = rows_view(
                groups[requester].mailbox.results, 0, num_rows, RowType(20, torch.float32)
            )
            assert torch.equal(result, make_rows(num_rows, seed=requester) @ weight(3))


def test_calls_for_different_units_are_computed_apart() -> None:
    with endpoints(3, UNITS, OWNERS, start=False) as groups:
        for requester, unit in ((1, UNITS[0]), (2, UNITS[3])):
            groups[requester].mailbox.send(0, unit.number, 0, 1)
        settle(groups)
        groups[0].service.serve(groups[0].mailbox.receive(0.0))
        assert groups[0].service.counters.gemms == 2
        assert groups[0].service.counters.fused_gemms == 0


def test_many_ranks_at_once_get_their_own_rows() -> None:
    wrong: list[tuple[int, int]] = []

    def run(requester: int, group: CasEndpoint) -> None:
        for step in range(100):
            num_rows = 1 + (step + requester) % 9
            group.requester.begin_step(num_rows)
            for unit in UNITS:
                if OWNERS[unit.block] != requester:
                    rows = make_rows(num_rows, seed=step * 3 + requester)
                    result = call(group, unit, rows)
                    if result is None or not torch.equal(result, rows @ weight(unit.block)):
                        wrong.append((requester, step))
            group.requester.end_step()

    with endpoints(3, UNITS, OWNERS) as groups:
        threads = [threading.Thread(target=run, args=item) for item in enumerate(groups)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert wrong == []
        counters = [group.counters() for group in groups]
        assert sum(c["rows_served"] for c in counters) == sum(c["rows_sent"] for c in counters)


def test_a_silent_owner_ends_the_steps_calls_and_is_left_alone_until_it_has_answered() -> None:
    with endpoints(2, UNITS[:2], [0, 1], start=False) as groups:
        remote = groups[0].requester
        remote._patience = 0.05
        remote.begin_step(2)
        started = time.monotonic()
        assert remote.call([1], UNITS[1], [make_rows(2)]) is None
        assert 0.04 < time.monotonic() - started < 5.0
        assert not remote.is_active and remote.is_in_step
        assert not remote.is_available()
        remote.end_step()
        remote.begin_step(2)  # a CaS step for this rank's other TP ranks
        assert remote.is_in_step and not remote.is_active
        remote.end_step()
        assert not remote.is_in_step
        groups[1].service.start()  # the owner goes on, and answers late
        deadline = time.monotonic() + 10
        while not remote.is_available():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        remote._patience = 10.0
        remote.begin_step(3)
        rows = make_rows(3, seed=9)
        result = remote.call([1], UNITS[1], [rows])
        assert result is not None
        assert torch.equal(result, rows @ weight(1))
        assert remote.counters.fallbacks == 2
        assert groups[1].counters()["rows_served"] == groups[0].counters()["rows_sent"] == 5


def test_what_the_requesters_gpu_had_to_do_before_is_not_the_owners_silence(kind: str) -> None:
    if kind != "cuda":
        pytest.skip("on CPUs rows are there when the call returns")
    with endpoints(2, UNITS[:2], [0, 1]) as groups:
        remote, driver = groups[0].requester, groups[0].mailbox._driver
        remote._patience = 0.1
        remote.begin_step(2)
        driver.enqueue(driver.current_stream(), lambda: time.sleep(0.5))  # a long prefill
        rows = make_rows(2)
        result = remote.call([1], UNITS[1], [rows])
        assert result is not None
        assert torch.equal(result, rows @ weight(1))
        assert remote.counters.wait_seconds > 0.4


def test_a_unit_that_fails_at_its_owner_falls_back() -> None:
    is_broken = threading.Event()

    def get_weight() -> torch.Tensor:
        if is_broken.is_set():
            raise RuntimeError("no such weights")
        return weight(1)

    units = [UNITS[0], matmul_unit(1, get_weight)]
    with endpoints(2, units, [0, 1]) as groups:
        is_broken.set()
        groups[0].requester.begin_step(2)
        assert groups[0].requester.call([1], units[1], [make_rows(2)]) is None
        assert groups[0].requester.is_available() and not groups[0].requester.is_active
        assert groups[1].counters()["failed"] == 1


def test_a_service_that_cannot_even_answer_says_so_once_and_ends() -> None:
    """As where work on its GPU has failed: silence would have requesters wait again and again."""
    failures: list[Exception] = []

    def answer(call: Call, outcome: Outcome) -> None:
        raise RuntimeError(f"the device has failed, {outcome.name} too")

    with endpoints(2, UNITS[:2], [0, 1]) as groups:
        service = groups[1].service
        service._on_failure = failures.append
        groups[1].mailbox.answer = answer  # type: ignore[method-assign]
        groups[0].mailbox.send(1, 1, 0, 1)
        service._thread.join(10.0)
        assert not service._thread.is_alive()
    assert [str(error) for error in failures] == ["the device has failed, FAILED too"]


def test_on_a_gpu_a_call_launches_a_graph_and_more_rows_than_fit_are_computed_without(
    kind: str,
) -> None:
    with endpoints(3, UNITS, OWNERS) as groups:
        sizes = (1, 2, 3, 33, 64)
        for num_rows in sizes:
            groups[1].requester.begin_step(num_rows)
            rows = make_rows(num_rows, seed=num_rows)
            result = call(groups[1], UNITS[3], rows)
            assert result is not None
            assert torch.equal(result, rows @ weight(3))
        if kind == "cuda":
            driver = groups[0].mailbox._driver
            assert driver.graphs == 2 * 7, "two units, 1 to 64 rows"
            assert driver.graph_launches == len(sizes)
            many = make_rows(100)  # of two requesters together
            unit = groups[0].service._units[3]
            assert torch.equal(unit.partial(many), many @ weight(3))
            assert driver.graph_launches == len(sizes)


@pytest.mark.parametrize(
    "descriptor", [(1, -8, 2), (1, 0, 10**9), (1, 0, 0), (77, 0, 1), (1, 3, 1), (1, 10**12, 1)]
)
def test_a_descriptor_outside_the_inbox_is_answered_as_failed(
    descriptor: tuple[int, int, int],
) -> None:
    with endpoints(2, UNITS[:2], [0, 1]) as groups:
        groups[0].mailbox.send(1, *descriptor)
        assert groups[0].mailbox.wait(1, 10.0) is Outcome.FAILED
        groups[0].requester.begin_step(1)
        assert groups[0].requester.call([1], UNITS[1], [make_rows(1)]) is not None


def test_more_rows_than_were_leased_are_not_sent() -> None:
    with endpoints(2, UNITS[:2], [0, 1]) as groups:
        groups[0].requester.begin_step(2)
        assert groups[0].requester.call([1], UNITS[1], [make_rows(3)]) is None
        assert groups[0].counters()["rows_sent"] == 0


def test_an_idle_service_sleeps() -> None:
    with endpoints(2, UNITS[:2], [0, 1]):
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.1


def test_a_call_is_received_once() -> None:
    with endpoints(2, UNITS[:2], [0, 1], start=False) as groups:
        groups[0].mailbox.send(1, 1, 0, 4)
        assert groups[1].mailbox.receive(1.0) == [Call(0, 1, 1, 0, 4, 0)]
        assert groups[1].mailbox.receive(0.0) == []


def half_unit(half: int) -> PooledUnit:
    """What one of two owners computes: half of the sum over the input's columns, of rows that are
    scaled each on its own: a payload of two tensors."""
    columns = slice(half * IN_WIDTH // 2, (half + 1) * IN_WIDTH // 2)

    def partial(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return (rows * scales)[:, columns] @ weight(0)[columns]

    payload = RowType(IN_WIDTH, torch.float32), RowType(1, torch.float32)
    result = RowType(OUT_WIDTH, torch.float32)
    return PooledUnit(0, 0, True, payload, result, partial, partial)


def test_the_owners_of_a_blocks_stripes_compute_a_part_each() -> None:
    halves = [half_unit(0), half_unit(1)]
    staging = make_staging([halves[0].row_bytes], num_ranks=4, num_stripes=2)
    with connected_mailboxes(staging) as mailboxes:
        owned = [[halves[0]], [halves[1]], [], []]
        ranks = [CasEndpoint(m, staging, units) for m, units in zip(mailboxes, owned, strict=True)]
        for owner in ranks[:2]:
            owner.service.start()
        for requester in (2, 3):
            rows, scales = make_rows(5, seed=requester), torch.arange(5.0).view(5, 1)
            ranks[requester].requester.begin_step(5)
            result = ranks[requester].requester.call([0, 1], halves[0], [rows, scales])
            assert result is not None
            assert torch.equal(result, (rows * scales) @ weight(0))
            assert ranks[requester].requester.counters.rows_sent == 2 * 5
        assert [owner.service.counters.rows_served for owner in ranks[:2]] == [10, 10]
        for endpoint in ranks[:2]:
            endpoint.service.close()


def test_one_silent_owner_of_several_ends_the_steps_calls() -> None:
    halves = [half_unit(0), half_unit(1)]
    staging = make_staging([halves[0].row_bytes], num_ranks=3, num_stripes=2)
    with connected_mailboxes(staging) as mailboxes:
        owned = [[halves[0]], [halves[1]], []]
        ranks = [CasEndpoint(m, staging, units) for m, units in zip(mailboxes, owned, strict=True)]
        ranks[0].service.start()
        requester, payload = ranks[2].requester, [make_rows(2), torch.ones(2, 1)]
        requester._patience = 0.05
        requester.begin_step(2)
        assert requester.call([0, 1], halves[0], payload) is None
        assert not requester.is_active and not requester.is_available()
        ranks[1].service.start()
        deadline = time.monotonic() + 10
        while not requester.is_available():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        requester._patience = 10.0
        requester.begin_step(2)
        result = requester.call([0, 1], halves[0], payload)
        assert result is not None and torch.equal(result, payload[0] @ weight(0))
        for endpoint in ranks[:2]:
            endpoint.service.close()


def test_a_payload_of_another_form_is_not_sent() -> None:
    with endpoints(2, UNITS[:2], [0, 1]) as groups:
        for wrong in (make_rows(2).double(), make_rows(2)[:, :5], make_rows(2)[None]):
            groups[0].requester.begin_step(2)
            assert groups[0].requester.call([1], UNITS[1], [wrong]) is None
        assert groups[0].counters()["rows_sent"] == 0

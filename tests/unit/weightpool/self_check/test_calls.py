"""Rows computed by their owners against the same computed here; the whole self-check of a group."""

import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch

from sidp_sgl.errors import SidpError
from sidp_sgl.weightpool.cas.endpoint import CasEndpoint
from sidp_sgl.weightpool.cas.unit import PooledUnit, RowType
from sidp_sgl.weightpool.self_check import calls, check
from sidp_sgl.weightpool.self_check.calls import is_alike, make_payload
from sidp_sgl.weightpool.self_check.check import Coverage, SelfCheck
from tests.support import cas
from tests.support.cas import endpoints, rows_unit
from tests.support.pools import Group, RankUnderTest, layer_tensors, run_group
from tests.support.transports import KINDS, make_transport

GROUP = Group(3, 8)
IN_WIDTH, OUT_WIDTH = 8, 40
Fault = Callable[[list[CasEndpoint]], None]


@pytest.fixture(params=KINDS, autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cas, "KIND", request.param)
    return request.param


def make_unit(layer: int, get_weight: Callable[[], torch.Tensor]) -> PooledUnit:
    def compute(rows: torch.Tensor) -> torch.Tensor:
        return rows @ get_weight().float().t()

    return rows_unit(layer, layer, IN_WIDTH, OUT_WIDTH, compute)


def owner_units() -> list[PooledUnit]:
    def weight(layer: int) -> torch.Tensor:
        return layer_tensors(layer)["down.weight"]

    return [make_unit(n, lambda n=n: weight(n)) for n in range(GROUP.num_layers)]


def run_checks(kind: str, plant: Fault = lambda parts: None) -> list[Coverage | SidpError]:
    """What every rank's self-check has covered, or what it says."""
    met = threading.Barrier(GROUP.num_ranks)
    ends: dict[int, Coverage | SidpError] = {}

    def run(parts: list[CasEndpoint], rank: RankUnderTest) -> None:
        check = SelfCheck(
            rank.pool,
            at_start=True,
            while_running=True,
            captures=kind == "cuda",
            meet=lambda: met.wait(30.0),
        )
        number = rank.pool.rank
        units = [
            make_unit(n, lambda n=n: rank.views[n]["down.weight"]) for n in range(len(rank.views))
        ]
        check.add_calls(parts[number].requester, units)
        try:
            check.check_blocks()
            check.check_calls()
            for _ in range(3):
                check.before_step()
                rank.run_steps(1)
            ends[number] = check.coverage
        except SidpError as error:
            ends[number] = error

    with endpoints(GROUP.num_ranks, owner_units(), GROUP.owners()) as parts:
        plant(parts)
        results = run_group(GROUP, lambda rank: run(parts, rank), lambda _: make_transport(kind))
        with suppress(RuntimeError):
            met.abort()
    assert not any(result.wrong for result in results)
    return [ends[rank] for rank in range(GROUP.num_ranks)]


def test_a_whole_self_check(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "CANARY_STEPS", 2)
    for rank, coverage in enumerate(run_checks(kind)):
        assert isinstance(coverage, Coverage), coverage
        placement = GROUP.placement()
        fetched = placement.fetched(rank)
        assert coverage.blocks == len(fetched)
        assert coverage.bytes == sum(map(placement.block_bytes, fetched))
        assert coverage.captured_blocks == (len(fetched) if kind == "cuda" else 0)
        assert coverage.owners_called == GROUP.num_ranks - 1
        assert coverage.canaries == 1 and coverage.skipped_turns == 0
        assert 0.0 < coverage.seconds < 30.0


def other_weights(parts: list[CasEndpoint]) -> None:
    """Rank 1 computes with those of a block that is not its own."""
    other = layer_tensors(0)["down.weight"]
    parts[1].service._units = {n: make_unit(n, lambda: other) for n in parts[1].service._units}


def wrong_rows(parts: list[CasEndpoint]) -> None:
    """The last row of what rank 0 has sent to others is not written."""
    requester = parts[0].requester
    send = requester._send

    def torn(owner, unit, payload, offset):
        send(owner, unit, [torch.cat([rows[:-1], 0 * rows[-1:]]) for rows in payload], offset)

    requester._send = torn


def unable(parts: list[CasEndpoint]) -> None:
    """Rank 1 knows none of its units."""
    parts[1].service._units = {}


def silent(parts: list[CasEndpoint]) -> None:
    parts[1].service.close()


FAULTS = [
    (other_weights, [0, 2], "DP rank 1 computes other results for its block 1"),
    (wrong_rows, [0], "computes other results for its block 1 than DP rank 0 does"),
    (unable, [0, 2], "DP rank 1 has not computed rows of DP rank"),
    (silent, [0, 2], "DP rank 1 has not computed rows of DP rank"),
]


@pytest.mark.parametrize(("plant", "ranks", "text"), FAULTS, ids=lambda value: str(value)[:24])
def test_an_owner_that_computes_something_else(
    kind: str, plant: Fault, ranks: list[int], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "WAIT_SECONDS", 2.0)
    ends = run_checks(kind, plant)
    assert [rank for rank, end in enumerate(ends) if isinstance(end, SidpError)] == ranks
    for rank in ranks:
        said = str(ends[rank])
        assert said.startswith("--sidp-self-check: ") and "\n" not in said
        assert text in said


def test_nothing_runs_where_it_is_off(kind: str) -> None:
    check = SelfCheck(None, at_start=False, while_running=False, captures=True, meet=pytest.fail)  # type: ignore[arg-type]
    check.check_blocks()
    check.check_calls()
    check.before_step()
    assert check.coverage == Coverage()


def test_payloads_are_what_any_unit_takes() -> None:
    kinds = RowType(6, torch.bfloat16), RowType(2, torch.float32), RowType(2, torch.int32)
    unit = rows_unit(0, 0, 6, 6, lambda rows: rows)
    unit = PooledUnit(**{**vars(unit), "payload": kinds})
    rows, weights, ids = make_payload(unit, seed=1)
    assert all(kind.fits(part) for kind, part in zip(kinds, (rows, weights, ids), strict=True))
    assert ids.tolist() == [[0, 1]] * calls.ROWS
    assert torch.equal(rows, make_payload(unit, seed=1)[0])
    assert not torch.equal(rows, make_payload(unit, seed=2)[0])


def test_results_are_alike_but_for_rounding() -> None:
    exact = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert is_alike(exact.bfloat16(), exact)
    assert not is_alike(exact.roll(1, 0), exact)
    for wrong in (0.0, float("nan"), float("inf")):
        other = exact.clone()
        other[7, :32] = wrong
        assert not is_alike(other, exact)
        assert is_alike(other, other.clone())
    assert is_alike(torch.zeros(8, 4), torch.zeros(8, 4))

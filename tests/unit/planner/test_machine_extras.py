"""What only measured machines have: each adds what it says, where it says, and nothing at 0."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.planner.gpus import GPUS, find_gpu
from sidp_sgl.planner.group_times import GroupTimes, Pooling
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import load_model
from sidp_sgl.planner.time_model import RankTimes, Work
from sidp_sgl.planner.weights import Split

SHAPE = load_model("Qwen3-8B")
machines = st.sampled_from(GPUS).map(Machine.from_gpu)
batches = st.integers(1, 512)


def group_on(machine: Machine, num_ranks: int = 4) -> GroupTimes:
    return GroupTimes(RankTimes(SHAPE, machine, Split()), Pooling(num_ranks))


@given(machines, batches, st.floats(0.01, 0.9))
def test_copies_take_their_share_of_the_compute_while_they_last(
    machine: Machine, batch: int, share: float
) -> None:
    free, slowed = group_on(machine), group_on(replace(machine, copy_share=share))
    work = Work.decode(batch, 1000)
    compute, fetches = free.rank.compute_seconds(work), free.fetch_seconds
    assert slowed.rank.compute_seconds(work) == compute, "nothing without fetches"
    assert slowed.cas_seconds(work) == free.cas_seconds(work)
    longer = slowed.was_seconds(work)
    assert longer >= free.was_seconds(work) * (1 - 1e-9)
    # Never longer than compute that is slowed down all the time, or by all fetches.
    limit = min(compute / (1 - share), compute + share * fetches)
    assert longer <= free.streamed_seconds(limit) * (1 + 1e-9)


def test_fetches_that_are_hidden_cost_their_share() -> None:
    machine = replace(Machine.from_gpu(GPUS[0]), link_bandwidth=1e15, copy_seconds=1e-6)
    free, slowed = group_on(machine), group_on(replace(machine, copy_share=0.25))
    work = Work.decode(64, 1000)
    more = slowed.was_seconds(work) - free.was_seconds(work)
    assert more == pytest.approx(0.25 * free.fetch_seconds, rel=0.05)


@given(machines, batches, st.floats(1e-6, 1e-3), st.floats(1e-6, 1e-3))
def test_requests_take_time_of_every_step(
    machine: Machine, batch: int, of_step: float, of_layer: float
) -> None:
    slow = replace(machine, request_seconds=of_step, attention_request_seconds=of_layer)
    more = batch * (of_step + SHAPE.num_layers * of_layer)
    work = Work.decode(batch, 1000)
    free, slowed = group_on(machine), group_on(slow)
    for seconds in (RankTimes.compute_seconds, None):
        before, after = (
            seconds(group.rank, work) if seconds else group.cas_seconds(work)
            for group in (free, slowed)
        )
        assert after - before == pytest.approx(more, rel=1e-6)


@given(machines, batches)
def test_rows_have_their_own_rate(machine: Machine, batch: int) -> None:
    work = Work.decode(batch, 1000)
    same, quick = (
        group_on(replace(machine, row_bandwidth=factor * machine.link_bandwidth))
        for factor in (1, 10)
    )
    assert same.cas_seconds(work) == group_on(machine).cas_seconds(work)
    assert quick.cas_seconds(work) < same.cas_seconds(work)
    assert quick.was_seconds(work) == same.was_seconds(work)


def calibration_file(folder: Path, **change: Any) -> Path:
    path = folder / "machine.json"
    values = asdict(Machine.from_gpu(find_gpu("H100"))) | change
    path.write_text(json.dumps({"machine": values}))
    return path


def test_a_calibration_file_that_is_none(tmp_path: Path) -> None:
    assert Machine.from_json(calibration_file(tmp_path)) == Machine.from_gpu(find_gpu("H100"))
    for bad in (tmp_path / "missing", tmp_path, Path(__file__)):
        with pytest.raises(SidpUsageError, match="sidp-sgl calibrate") as raised:
            Machine.from_json(bad)
        assert f"--calibration {bad} " in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [{"copy_share": 1.0}, {"copy_share": -0.1}, {"request_seconds": "1"}, {"link_bandwidth": 0},
     {"hbm_bandwidth": float("inf")}, {"step_seconds": float("nan")}],
)  # fmt: skip
def test_a_calibration_file_that_is_out_of_range(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(SidpUsageError, match=next(iter(change))):
        Machine.from_json(calibration_file(tmp_path, **change))

"""The fit finds a machine again from what it would measure, with noise and without."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidp_sgl.planner.calibrate.command import SMALL
from sidp_sgl.planner.calibrate.engine_steps import DEPTHS, LOADS, with_depth
from sidp_sgl.planner.calibrate.fit import fit_copy_share, fit_fetches, fit_gemms, fit_machine
from sidp_sgl.planner.calibrate.points import (
    CallPoint,
    CollectivePoint,
    FetchPoint,
    GemmPoint,
    Measurements,
    OverlapPoint,
    RankPoints,
    StepPoint,
    num_layers_of,
)
from sidp_sgl.planner.group_times import GroupTimes, Pooling
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import shape_from_config
from sidp_sgl.planner.time_model import RankTimes, Work, gemm_seconds
from sidp_sgl.planner.weights import Gemm, Split

SHAPE = shape_from_config(SMALL, "small")
WIDTHS = [(256, 512), (256, 2048), (1024, 256), (256, 1024)]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128]


def rates(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high)


# Machines whose GEMMs show both of their sides: small ones wait for bytes, large ones compute.
machines = st.builds(
    lambda bandwidth, intensity, **rest: Machine(
        name="synthetic",
        memory_bytes=1 << 30,
        hbm_bandwidth=bandwidth,
        bf16_flops=bandwidth * intensity,
        fp8_flops=bandwidth * intensity,
        **rest,
    ),
    bandwidth=rates(5e9, 2e10),
    intensity=rates(4, 16),
    kv_bandwidth=rates(1e9, 5e9),
    link_bandwidth=rates(2e7, 1e9),
    kernel_seconds=rates(3e-6, 2e-5),
    layer_seconds=rates(1e-4, 1e-3),
    collective_seconds=rates(1e-5, 1e-3),
    copy_seconds=rates(1e-5, 1e-3),
    round_trip_seconds=rates(5e-5, 1e-3),
    step_seconds=rates(1e-3, 5e-3),
    request_seconds=rates(1e-5, 2e-4),
    attention_request_seconds=rates(1e-5, 1e-4),
    row_bandwidth=rates(2e9, 5e9),
    copy_share=st.floats(0.0, 0.5),
)


def measured(machine: Machine, num_ranks: int, noise: float = 0.0, seed: int = 0) -> Measurements:
    """What a calibration of `machine` would see; `noise`: largest relative error of a point."""
    dice = random.Random(seed)

    def seen(seconds: float) -> float:
        return seconds * (1 + dice.uniform(-noise, noise))

    def rank(layers: int) -> RankTimes:
        return RankTimes(replace(SHAPE, num_layers=layers), machine, Split())

    group = GroupTimes(rank(num_layers_of(num_ranks)), Pooling(num_ranks))
    calls = []
    for rows in (1, 4, 16):
        local = group.rank.compute_seconds(Work.decode(rows, 128))
        sent = group.cas_seconds(Work.decode(rows, 128))
        calls.append(CallPoint(rows, local, sent))
    alone, fetches = 0.1, 0.06
    beside = alone + machine.copy_share * fetches
    ranks = RankPoints(
        gemms=[
            GemmPoint(rows, *width, seen(gemm_seconds(machine, Gemm(*width), rows)))
            for width in WIDTHS
            for rows in ROWS
        ],
        fetches=[
            FetchPoint(size, seen(machine.copy_seconds + size / machine.link_bandwidth))
            for size in (400_000, 1_600_000, 3_200_000)
        ],
        copy_rate=machine.row_bandwidth,
        overlaps=[OverlapPoint(alone, beside, fetches)] * 2,
        calls=calls,
        collectives=[
            CollectivePoint(rows, seen(group.rank.collective_seconds(rows, num_ranks)))
            for rows in (1, 16, 64)
        ],
    )
    steps = [
        StepPoint(
            depth, batch, prompt, seen(rank(depth).compute_seconds(Work.decode(batch, prompt)))
        )
        for depth in DEPTHS
        for batch, prompt in LOADS
    ]
    return Measurements("synthetic", SHAPE, num_ranks, 1 << 30, ranks, steps)


@settings(max_examples=25, deadline=None)
@given(machines, st.sampled_from([2, 4]))
def test_a_machine_is_found_again(machine: Machine, num_ranks: int) -> None:
    found = fit_machine(measured(machine, num_ranks))
    for name in ("hbm_bandwidth", "bf16_flops", "link_bandwidth", "copy_share", "row_bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(machine, name), rel=0.02, abs=1e-6)
    for name in ("kernel_seconds", "copy_seconds", "layer_seconds", "round_trip_seconds",
                 "collective_seconds"):  # fmt: skip
        assert getattr(found, name) == pytest.approx(getattr(machine, name), rel=0.1, abs=5e-6)
    check_predictions(machine, found, num_ranks, 0.02)


@settings(max_examples=25, deadline=None)
@given(machines, st.sampled_from([2, 4]), st.integers(0, 1000))
def test_with_noise_the_predictions_stay_near(machine: Machine, ranks: int, seed: int) -> None:
    check_predictions(machine, fit_machine(measured(machine, ranks, 0.05, seed)), ranks, 0.15)


def check_predictions(machine: Machine, found: Machine, num_ranks: int, band: float) -> None:
    """Of a depth and of batches that were not measured."""
    groups = [
        GroupTimes(RankTimes(replace(SHAPE, num_layers=12), m, Split()), Pooling(num_ranks))
        for m in (machine, found)
    ]
    true, modelled = groups
    assert modelled.fetch_seconds == pytest.approx(true.fetch_seconds, rel=band)
    for batch in (1, 5, 24, 60):
        work = Work.decode(batch, 100)
        assert modelled.rank.compute_seconds(work) == pytest.approx(
            true.rank.compute_seconds(work), rel=band
        )


@given(st.floats(1e-6, 1e-2), st.floats(1e6, 1e12))
def test_fetches_of_any_link(overhead: float, bandwidth: float) -> None:
    sizes = (1e5, 4e5, 8e5)
    points = [FetchPoint(int(size), overhead + size / bandwidth) for size in sizes]
    copy, link = fit_fetches(points)
    for point in points:
        assert copy + point.num_bytes / link == pytest.approx(point.seconds, rel=0.01)


def test_fetches_whose_bytes_take_no_time() -> None:
    copy, link = fit_fetches([FetchPoint(1000, 1e-3), FetchPoint(2000, 0.9e-3)])
    assert copy >= 0 and 0 < link < float("inf")


def test_copies_that_speed_up_the_compute_are_noise() -> None:
    assert fit_copy_share([OverlapPoint(0.1, 0.09, 0.05)]) == 0.0
    assert fit_copy_share([OverlapPoint(0.001, 1.0, 5.0)]) < 1


def test_gemms_that_only_wait_for_bytes() -> None:
    """The arithmetic is not seen: it is found to be fast enough not to matter."""
    points = [
        GemmPoint(rows, *width, 2 * (width[0] * width[1] + rows * sum(width)) / 1e10)
        for width in WIDTHS
        for rows in (1, 2, 4)
    ]
    kernel, bandwidth, flops = fit_gemms(points)
    assert bandwidth == pytest.approx(1e10, rel=0.1) and kernel < 5e-6
    assert 2 * 4 * 256 * 2048 / flops < 1.3 * 2 * 256 * 2048 / 1e10


def test_a_missing_kind_of_points_is_named() -> None:
    points = measured(Machine("m", 1, 1e10, 1e9, 1e11, 1e11, 1e9, 1e-6, 1e-5, 0, 0, 0, 1e-3), 2)
    for name in ("gemms", "fetches", "overlaps", "calls", "collectives"):
        with pytest.raises(ValueError, match="points of"):
            fit_machine(replace(points, ranks=replace(points.ranks, **{name: []})))
    with pytest.raises(ValueError, match="points of"):
        fit_machine(replace(points, steps=[]))


def test_depths_change_nothing_else() -> None:
    config = with_depth({**SMALL, "layer_types": ["full_attention"] * 8}, 2)
    assert config == {**SMALL, "num_hidden_layers": 2}

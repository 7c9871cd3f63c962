"""From measured points to the planner's Machine; every part by least relative squares.

The planner's own formulas say what is left for the overheads.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from statistics import median

import numpy
from scipy.optimize import least_squares, nnls

from sidp_sgl.planner.calibrate.points import (
    CallPoint,
    CollectivePoint,
    FetchPoint,
    GemmPoint,
    Measurements,
    OverlapPoint,
    StepPoint,
    num_layers_of,
)
from sidp_sgl.planner.group_times import GroupTimes, Pooling
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import ModelShape
from sidp_sgl.planner.time_model import RankTimes, Work
from sidp_sgl.planner.weights import Split, kv_bytes

_MOST_SHARE = 0.95
_FAST = 1e30


def fit_machine(measured: Measurements) -> Machine:
    """Raises ValueError where a kind of points is missing."""
    points = measured.ranks
    kernel, bandwidth, flops = fit_gemms(points.gemms)
    copy, link = fit_fetches(points.fetches)
    machine = Machine(
        name=measured.name,
        memory_bytes=measured.memory_bytes,
        hbm_bandwidth=bandwidth,
        kv_bandwidth=bandwidth,
        bf16_flops=flops,
        fp8_flops=flops,
        link_bandwidth=link,
        kernel_seconds=kernel,
        layer_seconds=0.0,
        collective_seconds=0.0,
        copy_seconds=copy,
        round_trip_seconds=0.0,
        step_seconds=0.0,
        row_bandwidth=max(points.copy_rate, link),
        copy_share=fit_copy_share(points.overlaps),
    )
    collective = fit_collectives(points.collectives, measured.shape, machine, measured.num_ranks)
    machine = replace(machine, collective_seconds=collective)
    machine = fit_steps(measured.steps, measured.shape, machine)
    shape = replace(measured.shape, num_layers=num_layers_of(measured.num_ranks))
    round_trip = fit_round_trip(points.calls, shape, machine, measured.num_ranks)
    return replace(machine, round_trip_seconds=round_trip)


def fit_gemms(points: Sequence[GemmPoint]) -> tuple[float, float, float]:
    """Seconds of a kernel, bytes per second, FLOP per second: of kernel + max(bytes, FLOP)."""
    _check(points, "GEMMs")
    rows, in_widths, out_widths, seconds = (
        numpy.array(c, float) for c in zip(*points, strict=True)
    )
    num_bytes = 2 * (in_widths * out_widths + rows * (in_widths + out_widths))
    work = 2 * rows * in_widths * out_widths

    def residuals(logs: numpy.ndarray) -> numpy.ndarray:
        kernel, bandwidth, flops = numpy.exp(logs)
        return numpy.log((kernel + numpy.maximum(num_bytes / bandwidth, work / flops)) / seconds)

    # The maximum has kinks: several starts, the best end.
    fits = [
        least_squares(residuals, numpy.log([kernel, rate * bytes_part, flop_rate * flop_part]))
        for kernel, (bytes_part, flop_part), rate, flop_rate in product(
            (0.1 * seconds.min(), 0.9 * seconds.min()),
            ((1.0, 1.0), (3.0, 1.0), (1.0, 3.0)),
            [(num_bytes / seconds).max()],
            [(work / seconds).max()],
        )
    ]
    kernel, bandwidth, flops = numpy.exp(min(fits, key=lambda fit: fit.cost).x)
    return float(kernel), float(bandwidth), float(flops)


def fit_fetches(points: Sequence[FetchPoint]) -> tuple[float, float]:
    """Seconds of a fetch beyond its bytes, bytes per second."""
    _check(points, "fetches")
    seconds = [point.seconds for point in points]
    overhead, per_byte = _least(
        [(1.0, float(point.num_bytes)) for point in points], seconds, seconds
    )
    if per_byte <= 0:  # blocks so small that their bytes take no time
        per_byte = min(point.seconds / point.num_bytes for point in points)
    return overhead, 1 / per_byte


def fit_copy_share(points: Sequence[OverlapPoint]) -> float:
    """Share of the compute's time that fetches take while they are under way."""
    _check(points, "overlaps")
    shares = [(p.beside - p.alone) / min(p.fetches, p.beside) for p in points]
    return min(max(median(shares), 0.0), _MOST_SHARE)


def fit_collectives(
    points: Sequence[CollectivePoint], shape: ModelShape, machine: Machine, num_ranks: int
) -> float:
    """What a sum over TP ranks takes beyond its bytes, as the planner has them."""
    _check(points, "collectives")
    times = RankTimes(shape, machine, Split())
    left = [p.seconds - times.collective_seconds(p.rows, num_ranks) for p in points]
    return max(0.0, median(left))


def fit_steps(points: Sequence[StepPoint], shape: ModelShape, machine: Machine) -> Machine:
    """`machine` with what a step takes beyond its GEMMs: of a step, a layer, a request, and a
    token of its context."""
    _check(points, "steps")
    token_bytes = kv_bytes(shape, 1, "bf16") / shape.num_layers
    terms = [
        (1.0, p.batch, p.layers, p.layers * p.batch, p.layers * p.batch * p.context * token_bytes)
        for p in points
    ]
    left = [p.seconds - _gemms_of_step(p, shape, machine) for p in points]
    step, request, layer, attention_request, per_kv_byte = _least(
        terms, left, [p.seconds for p in points]
    )
    return replace(
        machine,
        step_seconds=step,
        request_seconds=request,
        layer_seconds=layer,
        attention_request_seconds=attention_request,
        kv_bandwidth=1 / per_kv_byte if per_kv_byte > 0 else machine.hbm_bandwidth,
    )


def _gemms_of_step(point: StepPoint, shape: ModelShape, machine: Machine) -> float:
    """The planner's step without keys and values; `machine` has no other overheads yet."""
    times = RankTimes(replace(shape, num_layers=point.layers), machine, Split())
    return times.compute_seconds(Work(point.batch, 0, 0, point.batch))


def fit_round_trip(
    points: Sequence[CallPoint], shape: ModelShape, machine: Machine, num_ranks: int
) -> float:
    """What is left of a call when its GEMM and its rows are taken off, as the planner has them."""
    _check(points, "calls")
    group = GroupTimes(RankTimes(shape, machine, Split()), Pooling(num_ranks))
    calls = group.placement.most_slots
    trips = []
    for point in points:
        work = Work(point.rows, 0, 0, point.rows)
        known = group.cas_seconds(work) - group.rank.compute_seconds(work)
        trips.append((point.sent - point.local - known) / calls)
    return max(0.0, median(trips))


def _least(
    terms: Sequence[Sequence[float]], values: Sequence[float], scales: Sequence[float]
) -> list[float]:
    """Coefficients of 0 or more for `terms`, nearest to `values` in parts of `scales`."""
    matrix, right, scale = (numpy.array(a, float) for a in (terms, values, scales))
    matrix = matrix / scale[:, None]
    largest = numpy.maximum(matrix.max(axis=0), 1 / _FAST)  # columns alike in size
    return [float(c) for c in nnls(matrix / largest, right / scale)[0] / largest]


def _check(points: Sequence[object], what: str) -> None:
    if not points:
        raise ValueError(f"a calibration needs points of {what}")

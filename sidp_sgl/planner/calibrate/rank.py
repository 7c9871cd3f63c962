"""What one rank measures while all others measure the same: GEMMs, fetches, overlap, calls.

Every point begins at a barrier: ranks share cores, links and memory.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError
from typing import Any

import torch
from torch.nn.functional import linear

from sidp_sgl.planner.calibrate.device import Device, make_device
from sidp_sgl.planner.calibrate.layers import Compute, Decoder, Fetches, SentRows
from sidp_sgl.planner.calibrate.points import (
    CallPoint,
    CollectivePoint,
    FetchPoint,
    GemmPoint,
    OverlapPoint,
    RankPoints,
    num_layers_of,
)
from sidp_sgl.planner.models import ModelShape
from sidp_sgl.planner.weights import Split, block_bytes, layer_weights, padded_vocab
from sidp_sgl.weightpool.transport.devices import make_transport
from sidp_sgl.weightpool.transport.interface import Transport

BARRIER_SECONDS = 120.0
_REPEATS = 4
_GEMM_BYTES = 1 << 26  # of the copies of one weight, at least: more than caches hold
_OVERLAP_BATCHES = (4, 16)
_CALL_ROWS = (1, 4, 16)
_COLLECTIVE_ROWS = (1, 16, 64)
_COLLECTIVES = 20  # in a row, as in a step
_COVER = 1.5  # times its fetches, that a pass computes: they are hidden then


@dataclass(frozen=True)
class RankTask:
    """What rank `rank` of `num_ranks` measures; `meeting` is a name that all ranks give alike,
    `store` a file in which they may meet."""

    device: str
    shape: ModelShape
    rank: int
    num_ranks: int
    cores: tuple[int, ...]
    link_gbps: float | None
    meeting: str
    store: str
    point_seconds: float  # how long a point is measured, several times over


class RankMeasuring:
    """One rank's part, in a process of its own."""

    def __init__(self, task: RankTask, barrier: Barrier) -> None:
        self.task = task
        self._device: Device = make_device(task.device, task.rank, task.cores)
        self._barrier = barrier
        self._num_layers = num_layers_of(task.num_ranks)

    @torch.inference_mode()
    def run(self) -> RankPoints:
        gemms = self._gemms()
        block = block_bytes(self.task.shape, 0, Split(), "ffn")
        sizes = [max(4096, block // 4), block, 2 * block]
        fetches = [FetchPoint(size, self._fetch(size, self.task.link_gbps)) for size in sizes]
        unpaced = self._fetch(block, None) if self.task.link_gbps else fetches[1].seconds
        calls = [self._call(rows) for rows in _CALL_ROWS]
        pass_seconds = self._fetched_layers * fetches[1].seconds
        overlaps = [self._overlap(block, batch, pass_seconds) for batch in _OVERLAP_BATCHES]
        collectives = self._collectives()
        return RankPoints(gemms, fetches, block / unpaced, overlaps, calls, collectives)

    def _together(self) -> None:
        try:
            self._barrier.wait(BARRIER_SECONDS)
        except BrokenBarrierError:
            raise RuntimeError("another rank did not come to the next measurement") from None

    def _timed(self, run: Callable[[], Any], passes: int | None) -> float:
        """Seconds of one `run`. Without `passes`, as many as fill the time that all ranks measure
        for: none ends early and leaves its core to another."""
        self._together()
        run()  # after a wait slots are full and caches cold, which within a step they are not
        begun = time.perf_counter()
        done, seconds = 0, 0.0
        while done < (passes or 1) or (
            passes is None and time.perf_counter() - begun < self.task.point_seconds
        ):
            seconds += self._device.seconds(run)
            done += 1
        return seconds / done

    def _times(self, *runs: Callable[[], Any], passes: int | None = None) -> list[float]:
        """Of every run the least disturbed of some repeats, which alternate."""
        for run in runs:
            run()
        repeats = [[self._timed(run, passes) for run in runs] for _ in range(_REPEATS)]
        return [min(times) for times in zip(*repeats, strict=True)]

    def _gemms(self) -> list[GemmPoint]:
        shape, points = self.task.shape, []
        weights = layer_weights(shape, 0, Split())
        vocab = padded_vocab(shape.vocab_size, 1)
        gemms = {(g.in_width, g.out_width) for g in weights.attention + weights.ffn}
        for in_width, out_width in sorted({*gemms, (shape.hidden_size, vocab)}):
            num_bytes = 2 * in_width * out_width
            distinct = max(_GEMM_BYTES, 4 * self._device.cache_bytes)
            copies = max(1, min(shape.num_layers, -(-distinct // num_bytes)))
            weight = self._random(copies, out_width, in_width)
            for rows in (1, 2, 4, 8, 16, 32, 64, 64 * self.task.num_ranks):
                activations = self._random(rows, in_width)

                def run(weight: torch.Tensor = weight, rows: torch.Tensor = activations) -> None:
                    for one in weight:
                        linear(rows, one)

                (seconds,) = self._times(self._device.captured(run))
                points.append(GemmPoint(rows, in_width, out_width, seconds / copies))
        return points

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.bfloat16, device=self._device.device)

    def _transport(self, link_gbps: float | None) -> Transport:
        rate = None if link_gbps is None else link_gbps * 1e9
        return make_transport(self._device.device.type, rate)

    def _open(self, name: str, num_bytes: int, link_gbps: float | None) -> Fetches:
        task = self.task
        meeting = f"{task.meeting}-{name}"
        with torch.inference_mode(False):  # a thread of its own writes to the slots
            transport = self._transport(link_gbps)
            return Fetches(meeting, task.rank, task.num_ranks, num_bytes, transport)

    def _fetch(self, num_bytes: int, link_gbps: float | None) -> float:
        """Seconds of one fetch where nothing is computed."""
        fetches = self._open(f"fetch-{num_bytes}-{link_gbps}", num_bytes, link_gbps)
        try:
            watch = self._device.stopwatch()
            (seconds,) = self._times(lambda: fetches.run(lambda layer: None, watch), passes=4)
            self._together()
        finally:
            fetches.close()
        return seconds / self._fetched_layers

    @property
    def _fetched_layers(self) -> int:
        return self._num_layers - self._num_layers // self.task.num_ranks

    def _overlap(self, num_bytes: int, batch: int, fetch_seconds: float) -> OverlapPoint:
        """`fetch_seconds`: all fetches of a pass, with nothing computed meanwhile."""
        task = self.task
        decoder = Decoder(task.shape, self._num_layers, batch, self._device.device)
        fetches = self._open(f"overlap-{batch}", num_bytes, task.link_gbps)
        try:
            (once,) = self._times(self._pass(decoder, 1), passes=2)
            rounds = max(1, math.ceil(_COVER * fetch_seconds / once))
            compute, watches = self._layers(decoder, rounds), []

            def beside() -> None:
                watches.append(self._device.stopwatch())
                fetches.run(compute, watches[-1])

            # Without its waits for blocks: those are the planner's to say.
            alone, elapsed = self._times(self._pass(decoder, rounds), beside, passes=3)
            waited = statistics.median(watch.seconds for watch in watches)
            self._together()
        finally:
            fetches.close()
        return OverlapPoint(alone, elapsed - waited, fetch_seconds)

    def _layers(self, decoder: Decoder, rounds: int) -> Compute:
        """What computes a layer so many times; on a GPU, by one launch."""

        def layer_times(layer: int) -> None:
            for _ in range(rounds):
                decoder.ffn(layer, decoder.attend(layer, decoder.rows))

        runs = [self._device.captured(partial(layer_times, n)) for n in range(self._num_layers)]
        return lambda layer: runs[layer]()

    def _pass(self, decoder: Decoder, rounds: int) -> Callable[[], None]:
        compute = self._layers(decoder, rounds)

        def run() -> None:
            for layer in range(self._num_layers):
                compute(layer)

        return run

    def _call(self, num_rows: int) -> CallPoint:
        task = self.task
        decoder = Decoder(task.shape, self._num_layers, num_rows, self._device.device)
        meeting = f"{task.meeting}-calls-{num_rows}"
        with torch.inference_mode(False):
            transport, width = self._transport(None), task.shape.hidden_size
            sent = SentRows(meeting, task.rank, task.num_ranks, decoder, width, transport)
        attended: dict[int, torch.Tensor] = {}

        def attend(layer: int) -> None:
            attended[layer] = decoder.attend(layer, decoder.rows)

        attends = [self._device.captured(partial(attend, n)) for n in range(self._num_layers)]

        def run() -> None:
            for layer, attend_here in enumerate(attends):
                attend_here()
                sent.run(layer, attended[layer])

        try:
            local, away = self._times(self._pass(decoder, 1), run, passes=12)
            self._together()
        finally:
            sent.close()
        return CallPoint(num_rows, local, away)

    def _collectives(self) -> list[CollectivePoint]:
        task, points = self.task, []
        torch.distributed.init_process_group(
            "nccl" if task.device == "cuda" else "gloo",
            init_method=f"file://{task.store}",
            rank=task.rank,
            world_size=task.num_ranks,
        )
        try:
            for rows in _COLLECTIVE_ROWS:
                data = self._random(rows, task.shape.hidden_size)

                def run(data: torch.Tensor = data) -> None:
                    for _ in range(_COLLECTIVES):
                        torch.distributed.all_reduce(data)

                (seconds,) = self._times(run, passes=2)  # as many on every rank
                points.append(CollectivePoint(rows, seconds / _COLLECTIVES))
            self._together()
        finally:
            torch.distributed.destroy_process_group()
        return points

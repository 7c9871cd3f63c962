"""The device of one rank: its clock, its memory, its cores, its link to the others.

Room: calibration. The one place that tells CPU ranks from GPUs.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sidp_sgl.calibration.decoder import Decoder
from sidp_sgl.calibration.link import Fetches, SentRows

_HEAD_START_CYCLES = 200_000  # 0.1 ms


class CpuDevice:
    """A rank on its `cores`, as an engine's ranks have them."""

    cache_bytes = 0  # its caches are small

    def __init__(self, cores: Sequence[int]) -> None:
        self.device = torch.device("cpu")
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))

    def seconds(self, run: Callable[[], Any]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run` as a step does it."""
        return run

    def fetches(
        self, meeting: str, rank: int, num_ranks: int, num_bytes: int, link_gbps: float | None
    ) -> Fetches:
        from sidp_sgl.calibration.shm_link import ShmFetches

        return ShmFetches(meeting, rank, num_ranks, num_bytes, link_gbps)

    def sent_rows(
        self, meeting: str, rank: int, num_ranks: int, decoder: Decoder, hidden_size: int
    ) -> SentRows:
        from sidp_sgl.calibration.shm_link import ShmSentRows

        return ShmSentRows(meeting, rank, num_ranks, decoder, hidden_size)


class CudaDevice:
    """GPU number `rank`; time is that of the GPU, by events."""

    def __init__(self, rank: int) -> None:
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        self.cache_bytes = int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def seconds(self, run: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START_CYCLES)  # the launch itself is not timed
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run` as a CUDA graph, as decode steps are: launches from Python take longer."""
        run()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def fetches(
        self, meeting: str, rank: int, num_ranks: int, num_bytes: int, link_gbps: float | None
    ) -> Fetches:
        from sidp_sgl.calibration.cuda_link import CudaFetches

        return CudaFetches(rank, num_ranks, num_bytes)

    def sent_rows(
        self, meeting: str, rank: int, num_ranks: int, decoder: Decoder, hidden_size: int
    ) -> SentRows:
        from sidp_sgl.calibration.cuda_link import CudaSentRows

        return CudaSentRows(rank, num_ranks, decoder, hidden_size)


Device = CpuDevice | CudaDevice


def make_device(kind: str, rank: int, cores: Sequence[int]) -> Device:
    return CpuDevice(cores) if kind == "cpu" else CudaDevice(rank)


def num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def hardware_name(kind: str) -> str:
    """What the ranks run on: cores and model of the processor, or number and model of the GPUs."""
    if kind == "cuda":
        return f"{num_gpus()} x {torch.cuda.get_device_name(0)}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else platform.machine()}"

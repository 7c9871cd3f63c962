"""The device of one rank: its clock, its caches, its cores; the one place that tells CPU ranks from
GPUs."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_HEAD_START_CYCLES = 200_000  # 0.1 ms


class CpuDevice:
    """A rank on its `cores`, as an engine's ranks have them."""

    cache_bytes = 0  # its caches are small

    def __init__(self, cores: Sequence[int]) -> None:
        self.device = torch.device("cpu")
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))

    def seconds(self, run: Callable[[], Any]) -> float:
        watch = self.stopwatch()
        watch(run)
        return watch.seconds

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run` as a step does it."""
        return run

    def stopwatch(self) -> "CpuStopwatch":
        return CpuStopwatch()


class CudaDevice:
    """GPU number `rank`; time is that of the GPU, by events."""

    def __init__(self, rank: int) -> None:
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        self.cache_bytes = int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def seconds(self, run: Callable[[], Any]) -> float:
        watch = self.stopwatch()
        torch.cuda._sleep(_HEAD_START_CYCLES)  # the launch itself is not timed
        watch(run)
        return watch.seconds

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run` as a CUDA graph, as decode steps are: launches from Python take longer."""
        run()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # The thread that serves other ranks goes on meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        return graph.replay

    def stopwatch(self) -> "CudaStopwatch":
        return CudaStopwatch()


class CpuStopwatch:
    """The time of what it runs, added up."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, run: Callable[[], Any]) -> None:
        started = time.perf_counter()
        run()
        self.seconds += time.perf_counter() - started


class CudaStopwatch:
    """The same of the current stream; `seconds` waits for it."""

    def __init__(self) -> None:
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, run: Callable[[], Any]) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        self._spans.append((begin, end))

    @property
    def seconds(self) -> float:
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3


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

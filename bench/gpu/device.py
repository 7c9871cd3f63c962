"""A GPU as the checks see it; the tests put one in its place that needs no hardware."""

import statistics
import time
from collections.abc import Callable

import torch

from sidp_sgl.weightpool.transport.cuda.driver import CudaDriver

_WARM_SECONDS = 0.2  # an idle GPU runs at a fraction of its clock
_HEAD_START_CYCLES = 3_000_000


class Gpu:
    """PyTorch's current device. `scale` shrinks sizes; `in_processes`: ranks are processes."""

    scale = 1.0
    in_processes = True

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def driver(self) -> CudaDriver:
        """A new one, as every rank opens it."""
        return CudaDriver.of_pytorch()

    def launch(self, work: Callable[[], object]) -> None:
        """Enqueue `work` on the current stream."""
        work()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, step: Callable[[], object]) -> Callable[[], None]:
        """Run `step` twice, as SGLang does, and capture it; returns the graph's replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        return graph.replay

    def seconds(self, run: Callable[[], object], repeats: int = 10) -> float:
        """Median time of one `run` on the device, when its clocks are up; the host runs ahead, so
        that launches are not timed unless they take longer than a millisecond or two."""
        started = time.perf_counter()
        while time.perf_counter() - started < _WARM_SECONDS:
            run()
            torch.cuda.synchronize()
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_HEAD_START_CYCLES)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

"""What `bench.gpu` finds in place of a GPU: small sizes, ranks as threads, the fake driver."""

import time
from collections.abc import Callable

import torch

from bench.gpu.device import Gpu
from tests.support.fake_cuda import FakeCuda


class FakeGpu(Gpu):
    """The first driver that is opened is the one whose streams the check's own work runs on."""

    scale = 1e-3
    in_processes = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._drivers: list[FakeCuda] = []

    def driver(self) -> FakeCuda:
        self._drivers.append(FakeCuda())
        return self._drivers[-1]

    @property
    def _main(self) -> FakeCuda:
        return self._drivers[0] if self._drivers else self.driver()

    def launch(self, work: Callable[[], object]) -> None:
        self._main.enqueue(self._main.current_stream(), lambda: _run(work))

    def synchronize(self) -> None:
        for driver in self._drivers:
            driver.synchronize()

    def capture(self, step: Callable[[], object]) -> Callable[[], None]:
        for _ in range(2):
            step()
        with self._main.capture() as graph:
            step()
        return lambda: self._main.replay(graph, seed=len(graph))

    def seconds(self, run: Callable[[], object], repeats: int = 10) -> float:
        started = time.perf_counter()
        for _ in range(2):
            run()
        self.synchronize()
        return (time.perf_counter() - started) / 2


def _run(work: Callable[[], object]) -> None:
    work()

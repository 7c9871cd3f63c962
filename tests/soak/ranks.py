"""The rank processes of an engine under test: what they hold, and how they are stopped."""

import asyncio
import contextlib
import os
import random
from collections.abc import Sequence
from typing import NamedTuple

import psutil

from tests.support.traces import ranks

MEAN_PAUSE_SECONDS = 8.0
STOP_SECONDS = (0.1, 3.0)


class Resources(NamedTuple):
    """Of all ranks, by rank."""

    descriptors: list[int]
    threads: list[int]
    resident_mb: list[int]


def rank_processes() -> list[psutil.Process]:
    return [*ranks(os.getpid()).values()]


def resources(processes: Sequence[psutil.Process]) -> Resources:
    return Resources(
        [process.num_fds() for process in processes],
        [process.num_threads() for process in processes],
        [process.memory_info().rss // 10**6 for process in processes],
    )


class Stops:
    """Stops one rank at a time for a moment."""

    def __init__(self, processes: Sequence[psutil.Process], seed: int) -> None:
        self.count = 0
        self.seconds = 0.0
        self.processes = processes
        self._random = random.Random(seed)

    async def run(self) -> None:
        """Until cancelled; all ranks run afterwards."""
        try:
            while True:
                await asyncio.sleep(self._random.expovariate(1 / MEAN_PAUSE_SECONDS))
                process = self._random.choice(self.processes)
                seconds = self._random.uniform(*STOP_SECONDS)
                self.count += 1
                self.seconds += seconds
                process.suspend()
                await asyncio.sleep(seconds)
                process.resume()
        finally:
            for process in self.processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

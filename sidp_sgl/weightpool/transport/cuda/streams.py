"""Streams and events of the CUDA transport."""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sidp_sgl.kernels import pacing, ticket_lock
from sidp_sgl.weightpool.transport.cuda.driver import CudaDriver
from sidp_sgl.weightpool.transport.interface import (
    WAIT_SECONDS,
    ComputeStream,
    CopyStream,
    Event,
    PeerStripe,
    TransportError,
)

LOCK_SECONDS = 1.0  # without any reader releasing an owner's lock; a fetch takes milliseconds
_CLOSE_SECONDS = 5.0

OwnerLock = tuple[torch.Tensor, torch.Tensor]  # the lock, and the reader's part of it


@dataclass(frozen=True)
class Copier:
    """How the copy engine copies a block: in slices of `slice_bytes` unless 0; no faster than
    `bytes_per_second` unless 0: a slice starts when a link of that rate would be through with those
    before it."""

    bytes_per_second: float = 0.0
    slice_bytes: int = 0


class CudaEvent(Event):
    """An event of the driver, which goes with its object."""

    def __init__(self, driver: CudaDriver) -> None:
        self.handle = driver.create_event()
        self._driver = driver
        weakref.finalize(self, driver.destroy_event, self.handle).atexit = False

    def is_reached(self) -> bool:
        return self._driver.is_reached(self.handle)


class CudaComputeStream(ComputeStream):
    """Whatever stream PyTorch enqueues on at the moment: SGLang's, or the one that captures."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver

    def record(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._driver.record(event.handle, self._driver.current_stream())

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._driver.wait(self._driver.current_stream(), event.handle)

    def launch(self, work: Callable[[], object]) -> None:
        self._driver.launch(work)


class CudaCopyStream(CopyStream):
    """A stream of its own. `locks`: owner → its ticket lock and this reader's part of it; owners
    without one are read without turns."""

    def __init__(self, driver: CudaDriver, locks: dict[int, OwnerLock], copier: Copier) -> None:
        self._driver, self._locks, self._copier = driver, locks, copier
        self.handle = driver.create_stream()
        self._clock = driver.empty(8).view(torch.int64)  # when the fetch began

    def record(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._driver.record(event.handle, self.handle)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._driver.wait(self.handle, event.handle)

    def copy(self, target: torch.Tensor, source: PeerStripe) -> None:
        assert target.numel() == source.data.numel(), "a block fits its slot"
        rate, size = self._copier.bytes_per_second, self._copier.slice_bytes or target.numel()
        if rate:
            self._driver.run(self.handle, lambda: pacing.mark(self._clock))
        for start in range(0, target.numel(), size):
            end = min(start + size, target.numel())
            addresses = target.data_ptr() + start, source.data.data_ptr() + start
            self._driver.copy(*addresses, end - start, self.handle)
            if rate:
                self._pace(end / rate)

    def _pace(self, seconds: float) -> None:
        self._driver.run(self.handle, lambda: pacing.wait_until(self._clock, seconds))

    def take_turn(self, source: PeerStripe) -> None:
        if source.owner in self._locks:
            lock = self._locks[source.owner]
            self._driver.run(self.handle, lambda: ticket_lock.acquire(*lock, LOCK_SECONDS))

    def end_turn(self, source: PeerStripe) -> None:
        if source.owner in self._locks:
            lock = self._locks[source.owner]
            self._driver.run(self.handle, lambda: ticket_lock.release(*lock))

    def synchronize(self) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not self._driver.is_idle(self.handle):
            if time.monotonic() > deadline:
                raise TransportError(f"the copy stream was not done within {WAIT_SECONDS:.0f} s")
            time.sleep(20e-6)

    def close(self) -> bool:
        """Let the fetches under way end; whether they have."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        while not self._driver.is_idle(self.handle):
            if time.monotonic() > deadline:
                return False
            time.sleep(1e-3)
        self._driver.destroy_stream(self.handle)
        return True

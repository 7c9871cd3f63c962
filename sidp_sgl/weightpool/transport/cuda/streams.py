"""Streams, events and turns of the CUDA transport."""

import time
from dataclasses import dataclass

import torch

from sidp_sgl.kernels import copies, tickets
from sidp_sgl.weightpool.transport.cuda.driver import CudaDriver
from sidp_sgl.weightpool.transport.interface import (
    WAIT_SECONDS,
    CopyStream,
    Event,
    PeerStripe,
    Stream,
    TransportError,
)

PATIENCE_SECONDS = 1.0  # without any reader's turn at an owner ending; a fetch takes milliseconds
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True)
class Copier:
    """How blocks are copied: by the copy engine, or by a kernel with `programs` multiprocessors;
    in slices of `slice_bytes` unless 0; no faster than `bytes_per_second` unless 0: a slice starts
    when a link of that rate would be through with those before it, and a kernel without slices
    keeps to that timetable by itself."""

    programs: int = 0
    bytes_per_second: float = 0.0
    slice_bytes: int = 0


class CudaEvent(Event):
    """An event of the driver, which goes with its object."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self.handle = driver.create_event()

    def __del__(self) -> None:
        self._driver.destroy_event(self.handle)


class CudaComputeStream(Stream):
    """Whatever stream PyTorch enqueues on at the moment: SGLang's, or the one that captures."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver

    def record(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._driver.record(event.handle, self._driver.current_stream())

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._driver.wait(self._driver.current_stream(), event.handle)


class Port:
    """A reader's view of an owner's turns. `owner_words` may lie on the owner's GPU."""

    def __init__(self, owner_words: torch.Tensor, reader_words: torch.Tensor) -> None:
        self._owner_words = owner_words
        self._reader_words = reader_words

    def take_turn(self) -> None:
        tickets.take_turn(self._owner_words, self._reader_words, PATIENCE_SECONDS)

    def end_turn(self) -> None:
        tickets.end_turn(self._owner_words, self._reader_words)

    def skipped_turns(self) -> int:
        return int(self._reader_words[2])


class CudaCopyStream(CopyStream):
    """A stream of its own. Owners without a port are read without turns."""

    def __init__(self, driver: CudaDriver, ports: dict[int, Port], copier: Copier) -> None:
        self._driver = driver
        self._ports = ports
        self._copier = copier
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
        if self._copier.programs and not self._copier.slice_bytes:
            self._copy(target, source.data, rate)
            return
        if rate:
            self._driver.run(self.handle, lambda: copies.mark(self._clock))
        for start in range(0, target.numel(), size):
            self._copy(target[start : start + size], source.data[start : start + size])
            if rate:
                self._pace(min(start + size, target.numel()) / rate)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, rate: float = 0.0) -> None:
        programs = self._copier.programs
        if programs:
            self._driver.run(self.handle, lambda: copies.copy(target, source, rate, programs))
        else:
            addresses = target.data_ptr(), source.data_ptr()
            self._driver.copy(*addresses, target.numel(), self.handle)

    def _pace(self, seconds: float) -> None:
        self._driver.run(self.handle, lambda: copies.wait_until(self._clock, seconds))

    def take_turn(self, source: PeerStripe) -> None:
        if source.owner in self._ports:
            self._driver.run(self.handle, self._ports[source.owner].take_turn)

    def end_turn(self, source: PeerStripe) -> None:
        if source.owner in self._ports:
            self._driver.run(self.handle, self._ports[source.owner].end_turn)

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

"""A CUDA driver without a GPU: device memory is the host's, streams are threads.

Handles are real file descriptors and mappings real mappings, so they cross processes. Kernels are
their PyTorch references. Captured work becomes a graph, which is executed in any order that its
edges allow (`fake_graph.py`).
"""

import ctypes
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sidp_sgl.weightpool.transport.cuda.driver import CudaError, HandleKind
from tests.support.fake_graph import FakeGraph
from tests.support.fake_memory import FakeMemory
from tests.support.fake_streams import FakeEvent, FakeStream, Work


class FakeCuda(FakeMemory):
    """GPU `device` of `num_devices`. `kinds`: how its memory can be shared; `islands`: which GPUs
    reach each other (all, unless given); `seed`: work starts late, copies are torn."""

    def __init__(
        self,
        device: int = 0,
        num_devices: int = 1,
        kinds: tuple[HandleKind, ...] = (HandleKind.POSIX_FD,),
        islands: tuple[tuple[int, ...], ...] = (),
        atomics: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.device, self._num_devices = device, num_devices
        self._kinds, self._islands, self._atomics = kinds, islands, atomics
        self._dice = random.Random(seed) if seed is not None else None
        self._local = threading.local()
        self.graphs = self.graph_launches = 0  # of PyTorch's work alone

    # What tests ask for.

    @property
    def live(self) -> list[object]:
        """What was made and not given back: handles, mappings, streams."""
        things = [thing for thing in self._things.values() if not isinstance(thing, FakeEvent)]
        return [*things, *self._sizes]

    def end_streams(self) -> None:
        for number, thing in list(self._things.items()):
            if isinstance(thing, FakeStream):
                self.destroy_stream(number)

    def enqueue(self, stream: int, work: Work) -> None:
        target = self._stream(stream)
        if target.graph is not None:
            target.graph.add(stream, work)
            return
        if self._dice is not None:
            seconds = self._dice.uniform(0.0, 0.002)
            target.enqueue(lambda: time.sleep(seconds))
        target.enqueue(work)

    @contextmanager
    def capture(self) -> Iterator[FakeGraph]:
        """What this thread enqueues on its stream, and what joins it, becomes a graph."""
        stream = self.create_stream()
        graph = self._stream(stream).graph = FakeGraph()
        with self.on_stream(stream):
            yield graph
        for thing in list(self._things.values()):  # events may go meanwhile, with their objects
            if isinstance(thing, FakeStream) and thing.graph is graph:
                thing.graph = None
        self._stream(stream).enqueue(None)
        del self._things[stream]
        graph.end(stream)

    def replay(self, graph: FakeGraph, seed: int) -> None:
        self.enqueue(self.current_stream(), lambda: graph.execute(random.Random(seed)))

    # The driver.

    def _stream(self, number: int) -> FakeStream:
        stream = self._things[number]
        assert isinstance(stream, FakeStream)
        return stream

    def _event(self, number: int) -> FakeEvent:
        event = self._things[number]
        assert isinstance(event, FakeEvent)
        return event

    def bind_thread(self) -> None:
        pass

    def uuid(self, ordinal: int) -> str:
        return f"gpu-{ordinal}"

    def device_count(self) -> int:
        return self._num_devices

    def can_access_peer(self, peer: int) -> bool:
        return not self._islands or any({peer, self.device} <= set(i) for i in self._islands)

    def has_peer_atomics(self, peer: int) -> bool:
        return self._atomics

    def supports(self, kind: HandleKind) -> bool:
        return kind in self._kinds

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        cpu = torch.device("cpu")
        storage = torch._C._construct_storage_from_data_pointer(address, cpu, num_bytes)
        return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (num_bytes,))

    def empty(self, num_bytes: int) -> torch.Tensor:
        raw = torch.empty(num_bytes + 256, dtype=torch.uint8)
        return raw[-raw.data_ptr() % 256 :][:num_bytes]

    def create_stream(self) -> int:
        return self._keep(FakeStream())

    def destroy_stream(self, stream: int) -> None:
        self._stream(stream).enqueue(None)
        del self._things[stream]

    def current_stream(self) -> int:
        if not hasattr(self._local, "stream"):
            self._local.stream = self.create_stream()
        return self._local.stream

    @contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        before, self._local.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._local.stream = before

    def graph(self, work: Work) -> Work:
        work()
        self.graphs += 1

        def launch() -> None:
            self.graph_launches += 1
            work()

        return launch

    def run(self, stream: int, work: Work) -> None:
        self.enqueue(stream, work)

    def is_capturing(self, stream: int) -> bool:
        return self._stream(stream).graph is not None

    def is_idle(self, stream: int) -> bool:
        failure = self._stream(stream).failure
        if failure is not None:
            raise CudaError("CUDA_ERROR_ILLEGAL_ADDRESS (700)") from failure
        return self._stream(stream).is_idle()

    def synchronize(self) -> None:
        for number, thing in list(self._things.items()):
            while isinstance(thing, FakeStream) and not self.is_idle(number):
                time.sleep(1e-4)

    def create_event(self) -> int:
        return self._keep(FakeEvent())

    def destroy_event(self, event: int) -> None:
        self._things.pop(event, None)

    def record(self, event: int, stream: int) -> None:
        target, mark = self._stream(stream), self._event(event)
        mark.graph = target.graph
        if target.graph is not None:
            mark.nodes = target.graph.tail(stream)
            return
        mark.recorded += 1
        number = mark.recorded
        target.enqueue(lambda: mark.mark_done(number))

    def wait(self, stream: int, event: int) -> None:
        target, mark = self._stream(stream), self._event(event)
        if mark.graph is not None:
            if mark.graph.has_ended:
                raise CudaError("cuStreamWaitEvent: CUDA_ERROR_CAPTURED_EVENT (907)")
            target.graph = mark.graph
            target.graph.join(stream, mark.nodes)
            return
        if target.graph is not None and mark.recorded:
            raise CudaError("cuStreamWaitEvent: CUDA_ERROR_STREAM_CAPTURE_ISOLATION (905)")
        number = mark.recorded
        target.enqueue(lambda: mark.wait_for(number, lambda: None))

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        half = num_bytes // 2
        self.enqueue(stream, lambda: _move(target, source, half))
        self.enqueue(stream, lambda: _move(target + half, source + half, num_bytes - half))

    def write_word(self, stream: int, address: int, value: int) -> None:
        def write() -> None:
            ctypes.c_int64.from_address(address).value = value

        self.enqueue(stream, write)


def _move(target: int, source: int, num_bytes: int) -> None:
    ctypes.memmove(target, source, num_bytes)

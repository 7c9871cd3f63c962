"""A CUDA driver without a GPU: device memory is the host's, streams are threads.

What is fake lies behind the calls of `cuda.bindings.driver`, so that the transport's own driver is
what the tests run. File descriptors and mappings are real, so they cross processes. Kernels are
their PyTorch references. Captured work becomes a graph, which is executed in any order that its
edges allow (`fake_graph.py`).
"""

import ctypes
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from cuda.bindings import driver as cuda

from sidp_sgl.weightpool.transport.cuda.driver import CudaDriver
from tests.support.fake_graph import FakeGraph
from tests.support.fake_memory import OK, FakeMemory
from tests.support.fake_streams import FakeEvent, FakeStream, Work


class FakeApi(FakeMemory):
    """`cuda.bindings.driver` on `num_devices` GPUs; see FakeCuda."""

    def __init__(
        self,
        num_devices: int,
        islands: tuple[tuple[int, ...], ...],
        atomics: bool,
        lacks: Collection[Any],
        dice: random.Random | None,
    ) -> None:
        super().__init__()
        self._num_devices, self._islands, self._atomics = num_devices, islands, atomics
        self._lacks, self._dice = lacks, dice

    def stream(self, number: int) -> FakeStream:
        stream = self.things[number]
        assert isinstance(stream, FakeStream)
        return stream

    def _event(self, number: int) -> FakeEvent:
        event = self.things[number]
        assert isinstance(event, FakeEvent)
        return event

    def enqueue(self, stream: int, work: Work) -> None:
        target = self.stream(stream)
        if target.graph is not None:
            target.graph.add(stream, work)
            return
        if self._dice is not None:
            seconds = self._dice.uniform(0.0, 0.002)
            target.enqueue(lambda: time.sleep(seconds))
        target.enqueue(work)

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple:
        return OK, cuda.CUcontext(1)

    def cuCtxSetCurrent(self, context: Any) -> tuple:
        return (OK,)

    def cuDeviceGetAttribute(self, attribute: Any, device: int) -> tuple:
        return OK, int(attribute not in self._lacks)

    def cuDeviceGetCount(self) -> tuple:
        return OK, self._num_devices

    def cuDeviceGetUuid(self, device: int) -> tuple:
        return OK, SimpleNamespace(bytes=bytes([device] * 16))

    def cuDeviceGetP2PAttribute(self, attribute: Any, device: int, peer: int) -> tuple:
        if attribute == attribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED:
            return OK, int(self._atomics)
        assert attribute == attribute.CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED
        return OK, int(not self._islands or any({device, peer} <= set(i) for i in self._islands))

    def cuCtxGetStreamPriorityRange(self) -> tuple:
        return OK, 0, -5

    def cuStreamCreateWithPriority(self, flags: int, priority: int) -> tuple:
        assert flags == cuda.CUstream_flags.CU_STREAM_NON_BLOCKING and priority == -5, "the highest"
        return OK, cuda.CUstream(self.keep(FakeStream()))

    def cuStreamDestroy(self, stream: int) -> tuple:
        self.stream(stream).enqueue(None)
        del self.things[stream]
        return (OK,)

    def cuStreamQuery(self, stream: int) -> tuple:
        if self.stream(stream).failure is not None:
            return (cuda.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)
        return (OK if self.stream(stream).is_idle() else cuda.CUresult.CUDA_ERROR_NOT_READY,)

    def cuStreamIsCapturing(self, stream: int) -> tuple:
        return OK, cuda.CUstreamCaptureStatus(int(self.stream(stream).graph is not None))

    def cuEventCreate(self, flags: int) -> tuple:
        assert flags == cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return OK, cuda.CUevent(self.keep(FakeEvent()))

    def cuEventDestroy(self, event: int) -> tuple:
        self.things.pop(event, None)
        return (OK,)

    def cuEventQuery(self, event: int) -> tuple:
        is_reached = self._event(event).is_reached()
        return (OK if is_reached else cuda.CUresult.CUDA_ERROR_NOT_READY,)

    def cuEventRecord(self, event: int, stream: int) -> tuple:
        target, mark = self.stream(stream), self._event(event)
        mark.graph = target.graph
        if target.graph is not None:
            mark.nodes = target.graph.tail(stream)
            return (OK,)
        mark.recorded += 1
        number = mark.recorded
        target.enqueue(lambda: mark.mark_done(number))
        return (OK,)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple:
        target, mark = self.stream(stream), self._event(event)
        if mark.graph is not None:
            if mark.graph.has_ended:
                return (cuda.CUresult.CUDA_ERROR_CAPTURED_EVENT,)
            target.graph = mark.graph
            target.graph.join(stream, mark.nodes)
            return (OK,)
        if target.graph is not None and mark.recorded:
            return (cuda.CUresult.CUDA_ERROR_STREAM_CAPTURE_ISOLATION,)
        number = mark.recorded
        target.enqueue(lambda: mark.wait_for(number, lambda: None))
        return (OK,)

    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple:
        half = size // 2
        self.enqueue(stream, lambda: _move(target, source, half))
        self.enqueue(stream, lambda: _move(target + half, source + half, size - half))
        return (OK,)

    def cuStreamWriteValue64(self, stream: int, address: int, value: int, flags: int) -> tuple:
        def write() -> None:
            ctypes.c_int64.from_address(address).value = value

        self.enqueue(stream, write)
        return (OK,)


class FakeCuda(CudaDriver):
    """GPU `device` of `num_devices`. `islands`: which GPUs reach each other (all, unless given);
    `lacks`: attributes that the GPU does not have; `seed`: work starts late, copies are torn."""

    def __init__(
        self,
        device: int = 0,
        num_devices: int = 1,
        islands: tuple[tuple[int, ...], ...] = (),
        atomics: bool = True,
        lacks: Collection[Any] = (),
        seed: int | None = None,
    ) -> None:
        dice = random.Random(seed) if seed is not None else None
        self.api = FakeApi(num_devices, islands, atomics, lacks, dice)
        super().__init__(device, self.api)
        self.enqueue = self.api.enqueue
        self._local = threading.local()
        self.graphs = self.graph_launches = 0  # of PyTorch's work alone

    # What tests ask for.

    @property
    def live(self) -> list[object]:
        """What was made and not given back: handles, mappings, streams."""
        things = [thing for thing in self.api.things.values() if not isinstance(thing, FakeEvent)]
        return [*things, *self.api.sizes]

    def _streams(self) -> Iterator[tuple[int, FakeStream]]:
        for number, thing in list(self.api.things.items()):  # events may go meanwhile
            if isinstance(thing, FakeStream):
                yield number, thing

    def end_streams(self) -> None:
        for number, _ in self._streams():
            self.destroy_stream(number)

    def refuse(self, name: str) -> None:
        """From now on this call fails."""

        def refused(*arguments: object) -> tuple:
            return (cuda.CUresult.CUDA_ERROR_NOT_PERMITTED,)

        refused.__name__ = name
        setattr(self.api, name, refused)

    @contextmanager
    def capture(self) -> Iterator[FakeGraph]:
        """What this thread enqueues on its stream, and what joins it, becomes a graph."""
        stream = self.create_stream()
        graph = self.api.stream(stream).graph = FakeGraph()
        with self.on_stream(stream):
            yield graph
        for _, other in self._streams():
            if other.graph is graph:
                other.graph = None
        self.destroy_stream(stream)
        graph.end(stream)

    def replay(self, graph: FakeGraph, seed: int) -> None:
        self.enqueue(self.current_stream(), lambda: graph.execute(random.Random(seed)))

    # PyTorch's part.

    def bind_thread(self) -> None:
        pass

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        cpu = torch.device("cpu")
        storage = torch._C._construct_storage_from_data_pointer(address, cpu, num_bytes)
        return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (num_bytes,))

    def empty(self, num_bytes: int) -> torch.Tensor:
        raw = torch.empty(num_bytes + 256, dtype=torch.uint8)
        return raw[-raw.data_ptr() % 256 :][:num_bytes]

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

    def run(self, stream: int, work: Work) -> None:
        self.enqueue(stream, work)

    def launch(self, work: Callable[[], object]) -> None:
        self.enqueue(self.current_stream(), work)

    def captured(self, work: Work) -> Work:
        with self.capture() as graph:
            work()
        return lambda: self.replay(graph, seed=len(graph))

    def synchronize(self) -> None:
        for number, _ in self._streams():
            while not self.is_idle(number):
                time.sleep(1e-4)

    def graph(self, work: Work) -> Work:
        work()
        self.graphs += 1

        def launch() -> None:
            self.graph_launches += 1
            work()

        return launch


def _move(target: int, source: int, num_bytes: int) -> None:
    ctypes.memmove(target, source, num_bytes)

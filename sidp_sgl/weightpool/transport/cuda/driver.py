"""What the CUDA transport asks of the driver, and nothing more: two dozen calls.

`libcuda.LibCuda` asks the driver itself; the tests have a driver whose device memory is the host's
and whose streams are threads, so that handles, layouts and the order of events are tested anywhere.
Addresses, handles, streams and events are plain integers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import Enum
from functools import cached_property

import torch


class CudaError(RuntimeError):
    """A driver call failed; says which, and the driver's own name of the error."""


class HandleKind(Enum):
    """How memory can be given to another process; in the order in which they are tried."""

    POSIX_FD = "posix_fd"  # a VMM allocation by file descriptor: one node
    FABRIC = "fabric"  # a VMM allocation by 64 bytes: where containers can't pass descriptors
    IPC = "ipc"  # cuMemAlloc and cuIpcGetMemHandle: where the driver has no VMM


class CudaDriver(ABC):
    """One process's use of one device. `device` is its ordinal in this process."""

    device: int

    @abstractmethod
    def bind_thread(self) -> None:
        """Make the device's context that of the calling thread; each thread that calls needs it."""

    @abstractmethod
    def uuid(self, ordinal: int) -> str:
        """What identifies a GPU in all processes."""

    @abstractmethod
    def device_count(self) -> int:
        """GPUs that this process sees."""

    @abstractmethod
    def can_access_peer(self, peer: int) -> bool:
        """Whether `device` can map the memory of the GPU with ordinal `peer`."""

    @abstractmethod
    def has_peer_atomics(self, peer: int) -> bool:
        """Whether atomic operations of `device` on `peer`'s memory are atomic for both."""

    @abstractmethod
    def supports(self, kind: HandleKind) -> bool:
        """Whether the device says that it can share memory in this way."""

    # Memory of the VMM kind: create → map → (export | import) → unmap → release.

    @abstractmethod
    def granularity(self, kind: HandleKind) -> int:
        """Sizes of allocations are multiples of this many bytes."""

    @abstractmethod
    def create(self, num_bytes: int, kind: HandleKind) -> int:
        """Handle of physical memory on `device`; its content is undefined."""

    @abstractmethod
    def map(self, handle: int, num_bytes: int, granularity: int) -> int:
        """Address at which `device` may read and write the memory of `handle`."""

    @abstractmethod
    def unmap(self, address: int, num_bytes: int) -> None:
        """Undo `map`. No work may be under way that uses the address."""

    @abstractmethod
    def release(self, handle: int) -> None:
        """Give the handle up; the memory lives on while anybody maps it."""

    @abstractmethod
    def export_fd(self, handle: int) -> int:
        """A new file descriptor for the memory (POSIX_FD)."""

    @abstractmethod
    def import_fd(self, fd: int) -> int:
        """Handle of a peer's memory; the descriptor stays the caller's."""

    @abstractmethod
    def export_fabric(self, handle: int) -> bytes:
        """64 bytes that stand for the memory on every GPU of the fabric (FABRIC)."""

    @abstractmethod
    def import_fabric(self, data: bytes) -> int:
        """Handle of a peer's memory."""

    # Memory of the legacy kind.

    @abstractmethod
    def alloc(self, num_bytes: int) -> int:
        """Address of memory on `device`."""

    @abstractmethod
    def free(self, address: int) -> None:
        """Undo `alloc`."""

    @abstractmethod
    def ipc_handle(self, address: int) -> bytes:
        """64 bytes by which another process can open the memory (IPC)."""

    @abstractmethod
    def ipc_open(self, data: bytes) -> int:
        """Address of another process's memory."""

    @abstractmethod
    def ipc_close(self, address: int) -> None:
        """Undo `ipc_open`."""

    @abstractmethod
    def register_host(self, address: int, num_bytes: int) -> int:
        """Pin host memory (whole pages); returns the address that the device has for it."""

    @abstractmethod
    def unregister_host(self, address: int) -> None:
        """Undo `register_host`."""

    @abstractmethod
    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 over memory that the caller keeps alive."""

    @abstractmethod
    def empty(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 of PyTorch's own, aligned to 256 bytes."""

    # Streams and events.

    @abstractmethod
    def create_stream(self) -> int:
        """A stream of highest priority that does not wait for the default stream."""

    @abstractmethod
    def destroy_stream(self, stream: int) -> None:
        """Its work goes on to its end."""

    @abstractmethod
    def current_stream(self) -> int:
        """The stream on which PyTorch enqueues now, in this thread."""

    @abstractmethod
    def on_stream(self, stream: int) -> AbstractContextManager[object]:
        """Inside, PyTorch and Triton enqueue on `stream`, in this thread."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block until all work of this process on the device is done."""

    @abstractmethod
    def is_capturing(self, stream: int) -> bool:
        """Whether what is enqueued becomes part of a graph instead of being executed."""

    @abstractmethod
    def is_idle(self, stream: int) -> bool:
        """Whether all work of the stream is done; raises CudaError where some of it failed."""

    @abstractmethod
    def create_event(self) -> int:
        """An event without timing."""

    @abstractmethod
    def destroy_event(self, event: int) -> None:
        """Waits that were enqueued stay."""

    @abstractmethod
    def record(self, event: int, stream: int) -> None:
        """Mark this point of the stream."""

    @abstractmethod
    def wait(self, stream: int, event: int) -> None:
        """Later work of the stream waits for the event's latest mark, if it has one."""

    @abstractmethod
    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Enqueue a copy between addresses of the device, by the copy engine."""

    @abstractmethod
    def write_word(self, stream: int, address: int, value: int) -> None:
        """Enqueue a write of 64 bits, visible everywhere only after all earlier writes of the
        stream; `address`: a device's or, registered, the host's."""

    def graph(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` enqueues through PyTorch on the current stream, to be launched again and
        again on it; `work` runs once before, to warm up. All graphs of a driver share memory."""
        work()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the driver meanwhile is not of this graph.
        graph.capture_begin(pool=self._graph_pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
        return graph.replay

    @cached_property
    def _graph_pool(self) -> tuple[int, int]:
        return torch.cuda.graph_pool_handle()

    def run(self, stream: int, work: Callable[[], None]) -> None:
        """Enqueue what `work` enqueues through PyTorch or Triton."""
        with self.on_stream(stream):
            work()

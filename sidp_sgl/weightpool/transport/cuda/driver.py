"""What the CUDA transport asks of the driver, through `cuda-bindings`, which PyTorch brings.

Addresses, handles, streams and events are plain integers. To be imported by ranks on GPUs only.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from typing import Any

import torch
from cuda.bindings import driver as cuda

_Attribute = cuda.CUdevice_attribute
# What --sidp needs of a GPU and its driver.
NEEDED = {
    _Attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: "virtual memory management",
    _Attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: (
        "memory that is shared by file descriptor"
    ),
    _Attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS: (
        "64-bit stream memory operations"
    ),
}
_FILE_DESCRIPTOR = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


class CudaError(RuntimeError):
    """A driver call failed; says which, and the driver's own name of the error."""


class CudaDriver:
    """One process's use of one device, by its ordinal in this process; the context is PyTorch's.

    `api`: cuda.bindings.driver. Raises CudaError where the device lacks something of NEEDED.
    """

    def __init__(self, device: int, api: Any = cuda) -> None:
        self.device, self._api = device, api
        self._external: dict[int, torch.cuda.ExternalStream] = {}  # by handle
        self._context = self._call(api.cuDevicePrimaryCtxRetain, device)
        self._call(api.cuCtxSetCurrent, self._context)
        for attribute, name in NEEDED.items():
            if not self._call(api.cuDeviceGetAttribute, attribute, device):
                raise CudaError(
                    f"GPU {device} or its driver has no {name}, which --sidp needs: update the "
                    "driver, use the GPU without vGPU or WSL, or start without --sidp"
                )

    @classmethod
    def of_pytorch(cls) -> "CudaDriver":
        """For PyTorch's current device."""
        torch.cuda.init()
        return cls(torch.cuda.current_device())

    def _call(self, function: Callable[..., Any], *arguments: object) -> Any:
        """The one value that `function` returns, None, or a list; raises CudaError."""
        code, *values = function(*arguments)
        if code != cuda.CUresult.CUDA_SUCCESS:
            raise CudaError(f"{function.__name__}: {code.name} ({int(code)})")
        return values[0] if len(values) == 1 else values

    def bind_thread(self) -> None:
        """Make the device's context that of the calling thread; each thread that calls needs it."""
        torch.cuda.set_device(self.device)
        self._call(self._api.cuCtxSetCurrent, self._context)

    # Other devices.

    def device_count(self) -> int:
        """GPUs that this process sees."""
        return self._call(self._api.cuDeviceGetCount)

    def uuid(self, ordinal: int) -> str:
        """What identifies a GPU in all processes."""
        return self._call(self._api.cuDeviceGetUuid, ordinal).bytes.hex()

    def can_access_peer(self, peer: int) -> bool:
        """Whether `device` can map the memory of the GPU with ordinal `peer`."""
        attribute = cuda.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED
        return self._call(self._api.cuDeviceGetP2PAttribute, attribute, self.device, peer) == 1

    def has_peer_atomics(self, peer: int) -> bool:
        """Whether atomic operations of `device` on `peer`'s memory are atomic for both."""
        attribute = cuda.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
        return self._call(self._api.cuDeviceGetP2PAttribute, attribute, self.device, peer) == 1

    # Memory that other processes can map: create → map → (export | import) → unmap → release.

    def create(self, num_bytes: int) -> tuple[int, int]:
        """Handle of physical memory on `device`, and its size: `num_bytes` or some more, to be
        mapped as a whole. Its content is undefined."""
        prop = cuda.CUmemAllocationProp()
        prop.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        prop.requestedHandleTypes = _FILE_DESCRIPTOR
        prop.location = self._location()
        option = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        granularity = self._call(self._api.cuMemGetAllocationGranularity, prop, option)
        size = -(-num_bytes // granularity) * granularity
        return int(self._call(self._api.cuMemCreate, size, prop, 0)), size

    def map(self, handle: int, num_bytes: int) -> int:
        """Address at which `device` may read and write the memory of `handle`."""
        access = cuda.CUmemAccessDesc()
        access.location = self._location()
        access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        with ExitStack() as undo:
            address = int(self._call(self._api.cuMemAddressReserve, num_bytes, 0, 0, 0))
            undo.callback(self._call, self._api.cuMemAddressFree, address, num_bytes)
            self._call(self._api.cuMemMap, address, num_bytes, 0, handle, 0)
            undo.callback(self._call, self._api.cuMemUnmap, address, num_bytes)
            self._call(self._api.cuMemSetAccess, address, num_bytes, [access], 1)
            undo.pop_all()
        return address

    def _location(self) -> Any:
        location = cuda.CUmemLocation()
        location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = self.device
        return location

    def unmap(self, address: int, num_bytes: int) -> None:
        """Undo `map`. No work may be under way that uses the address."""
        self._call(self._api.cuMemUnmap, address, num_bytes)
        self._call(self._api.cuMemAddressFree, address, num_bytes)

    def release(self, handle: int) -> None:
        """Give the handle up; the memory lives on while anybody maps it or has a descriptor."""
        self._call(self._api.cuMemRelease, handle)

    def export_fd(self, handle: int) -> int:
        """A new file descriptor for the memory."""
        return self._call(self._api.cuMemExportToShareableHandle, handle, _FILE_DESCRIPTOR, 0)

    def import_fd(self, fd: int) -> int:
        """Handle of a peer's memory; the descriptor stays the caller's."""
        return int(self._call(self._api.cuMemImportFromShareableHandle, fd, _FILE_DESCRIPTOR))

    def register_host(self, address: int, num_bytes: int) -> int:
        """Pin host memory (whole pages); returns the address that the device has for it."""
        flags = cuda.CU_MEMHOSTREGISTER_PORTABLE | cuda.CU_MEMHOSTREGISTER_DEVICEMAP
        self._call(self._api.cuMemHostRegister, address, num_bytes, flags)
        return int(self._call(self._api.cuMemHostGetDevicePointer, address, 0))

    def unregister_host(self, address: int) -> None:
        """Undo `register_host`."""
        self._call(self._api.cuMemHostUnregister, address)

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 over memory that the caller keeps alive."""
        device = torch.device("cuda", self.device)
        storage = torch._C._construct_storage_from_data_pointer(address, device, num_bytes)
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (num_bytes,))

    def empty(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 of PyTorch's own, aligned to 256 bytes."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=f"cuda:{self.device}")

    # Streams and events.

    def create_stream(self) -> int:
        """A stream of highest priority that does not wait for the default stream."""
        _, highest = self._call(self._api.cuCtxGetStreamPriorityRange)
        flags = cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._call(self._api.cuStreamCreateWithPriority, flags, highest))

    def destroy_stream(self, stream: int) -> None:
        """Its work goes on to its end."""
        self._external.pop(stream, None)
        self._call(self._api.cuStreamDestroy, stream)

    def current_stream(self) -> int:
        """The stream on which PyTorch enqueues now, in this thread."""
        return torch._C._cuda_getCurrentRawStream(self.device)

    def on_stream(self, stream: int) -> AbstractContextManager[object]:
        """Inside, PyTorch and Triton enqueue on `stream`, in this thread."""
        if stream not in self._external:  # making one takes longer than a kernel's launch
            self._external[stream] = torch.cuda.ExternalStream(stream, device=self.device)
        return torch.cuda.stream(self._external[stream])

    def run(self, stream: int, work: Callable[[], None]) -> None:
        """Enqueue what `work` enqueues through PyTorch or Triton."""
        with self.on_stream(stream):
            work()

    def launch(self, work: Callable[[], object]) -> None:
        """Enqueue what `work` enqueues through PyTorch on the current stream."""
        work()

    def synchronize(self) -> None:
        """Block until all work of this process on the device is done."""
        torch.cuda.synchronize(self.device)

    def is_idle(self, stream: int) -> bool:
        """Whether all work of the stream is done; raises CudaError where some of it failed."""
        (code,) = self._api.cuStreamQuery(stream)
        if code not in (cuda.CUresult.CUDA_SUCCESS, cuda.CUresult.CUDA_ERROR_NOT_READY):
            raise CudaError(f"work on GPU {self.device} has failed: {code.name} ({int(code)})")
        return code == cuda.CUresult.CUDA_SUCCESS

    def is_reached(self, event: int) -> bool:
        """Whether the event's latest mark is behind its stream."""
        (code,) = self._api.cuEventQuery(event)
        if code not in (cuda.CUresult.CUDA_SUCCESS, cuda.CUresult.CUDA_ERROR_NOT_READY):
            raise CudaError(f"work on GPU {self.device} has failed: {code.name} ({int(code)})")
        return code == cuda.CUresult.CUDA_SUCCESS

    def is_capturing(self, stream: int) -> bool:
        """Whether what is enqueued becomes part of a graph instead of being executed."""
        none = cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        return self._call(self._api.cuStreamIsCapturing, stream) != none

    def create_event(self) -> int:
        """An event without timing."""
        flags = cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return int(self._call(self._api.cuEventCreate, flags))

    def destroy_event(self, event: int) -> None:
        """Waits that were enqueued stay."""
        self._api.cuEventDestroy(event)  # unchecked: nobody could do anything about it

    def record(self, event: int, stream: int) -> None:
        """Mark this point of the stream."""
        self._call(self._api.cuEventRecord, event, stream)

    def wait(self, stream: int, event: int) -> None:
        """Later work of the stream waits for the event's latest mark, if it has one."""
        self._call(self._api.cuStreamWaitEvent, stream, event, 0)

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Enqueue a copy between addresses of the device, by the copy engine."""
        self._call(self._api.cuMemcpyDtoDAsync, target, source, num_bytes, stream)

    def write_value(self, stream: int, address: int, value: int) -> None:
        """Enqueue a write of 64 bits, visible everywhere only after all earlier writes of the
        stream; `address`: a device's or, registered, the host's."""
        self._call(self._api.cuStreamWriteValue64, stream, address, value, 0)

    def graph(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` enqueues through PyTorch on the current stream, to be launched again and
        again on it; `work` runs once before, to warm up. All graphs of a driver share memory."""
        work()
        self.synchronize()
        return self._graph_of(work, self._graph_pool)

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work`, which has been warmed up, enqueues on the current stream, and on others that
        it forks and joins, to be launched on the stream that is current then. With memory of its
        own."""
        stream = self.create_stream()
        try:
            with self.on_stream(stream):
                return self._graph_of(work, None)
        finally:
            self.destroy_stream(stream)

    def _graph_of(
        self, work: Callable[[], None], pool: tuple[int, int] | None
    ) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the driver meanwhile is not of this graph.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
        return graph.replay

    @cached_property
    def _graph_pool(self) -> tuple[int, int]:
        return torch.cuda.graph_pool_handle()

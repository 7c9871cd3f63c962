"""The driver itself, by ctypes: its interface is stable across versions, and it is there wherever
a GPU is.
"""

import ctypes
from contextlib import AbstractContextManager
from ctypes import byref, c_int, c_size_t, c_uint, c_ulonglong, c_void_p

import torch

from sidp_sgl.weightpool.transport.cuda import libcuda_abi as abi
from sidp_sgl.weightpool.transport.cuda.driver import CudaDriver, CudaError, HandleKind


class LibCuda(CudaDriver):
    """PyTorch's device of this process: its primary context is the one that PyTorch uses."""

    def __init__(self) -> None:
        torch.cuda.init()
        self.device = torch.cuda.current_device()
        self._external: dict[int, torch.cuda.ExternalStream] = {}  # by handle
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._cuda.cuGetErrorName.restype = c_int
        self._context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), c_int(self.device))
        self._call("cuCtxSetCurrent", self._context)
        if not self._attribute(abi.MEM_OPS_64_BIT_ATTRIBUTE):
            raise CudaError(
                f"GPU {self.device} or its driver has no 64-bit stream memory operations, which "
                "--sidp needs: update the driver"
            )

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(c_int(code), byref(text))
            raise CudaError(f"{name}: {(text.value or b'?').decode()} ({code})")

    def _attribute(self, number: int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), c_int(number), c_int(self.device))
        return value.value

    def bind_thread(self) -> None:
        torch.cuda.set_device(self.device)
        self._call("cuCtxSetCurrent", self._context)

    def uuid(self, ordinal: int) -> str:
        data = abi.Bytes16()
        self._call("cuDeviceGetUuid_v2", byref(data), c_int(ordinal))
        return bytes(data).hex()

    def device_count(self) -> int:
        return torch.cuda.device_count()

    def can_access_peer(self, peer: int) -> bool:
        return self._peer_attribute(abi.P2P_ACCESS, peer) == 1

    def has_peer_atomics(self, peer: int) -> bool:
        return self._peer_attribute(abi.P2P_NATIVE_ATOMICS, peer) == 1

    def _peer_attribute(self, number: int, peer: int) -> int:
        value = c_int()
        devices = c_int(self.device), c_int(peer)
        self._call("cuDeviceGetP2PAttribute", byref(value), c_int(number), *devices)
        return value.value

    def supports(self, kind: HandleKind) -> bool:
        if kind is HandleKind.IPC:
            return True
        try:
            return bool(
                self._attribute(abi.VMM_ATTRIBUTE) and self._attribute(abi.HANDLE_ATTRIBUTES[kind])
            )
        except CudaError:  # a driver that is older than the kind
            return False

    def granularity(self, kind: HandleKind) -> int:
        value, prop = c_size_t(), abi.allocation_prop(self.device, kind)
        option = c_int(abi.RECOMMENDED)
        self._call("cuMemGetAllocationGranularity", byref(value), byref(prop), option)
        return value.value

    def create(self, num_bytes: int, kind: HandleKind) -> int:
        handle, prop = c_ulonglong(), abi.allocation_prop(self.device, kind)
        size, flags = c_size_t(num_bytes), c_ulonglong(0)
        self._call("cuMemCreate", byref(handle), size, byref(prop), flags)
        return handle.value

    def map(self, handle: int, num_bytes: int, granularity: int) -> int:
        address, size, none = c_ulonglong(), c_size_t(num_bytes), c_ulonglong(0)
        alignment = c_size_t(granularity)
        self._call("cuMemAddressReserve", byref(address), size, alignment, none, none)
        try:
            self._call("cuMemMap", address, size, c_size_t(0), c_ulonglong(handle), none)
            try:
                access = abi.access_desc(self.device)
                self._call("cuMemSetAccess", address, size, byref(access), c_size_t(1))
            except CudaError:
                self._call("cuMemUnmap", address, size)
                raise
        except CudaError:
            self._call("cuMemAddressFree", address, size)
            raise
        return address.value

    def unmap(self, address: int, num_bytes: int) -> None:
        self._call("cuMemUnmap", c_ulonglong(address), c_size_t(num_bytes))
        self._call("cuMemAddressFree", c_ulonglong(address), c_size_t(num_bytes))

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", c_ulonglong(handle))

    def export_fd(self, handle: int) -> int:
        fd, kind = c_int(-1), c_int(abi.HANDLE_TYPES[HandleKind.POSIX_FD])
        arguments = c_ulonglong(handle), kind, c_ulonglong(0)
        self._call("cuMemExportToShareableHandle", byref(fd), *arguments)
        return fd.value

    def import_fd(self, fd: int) -> int:
        handle, kind = c_ulonglong(), c_int(abi.HANDLE_TYPES[HandleKind.POSIX_FD])
        self._call("cuMemImportFromShareableHandle", byref(handle), c_void_p(fd), kind)
        return handle.value

    def export_fabric(self, handle: int) -> bytes:
        data, kind = abi.Bytes64(), c_int(abi.HANDLE_TYPES[HandleKind.FABRIC])
        arguments = c_ulonglong(handle), kind, c_ulonglong(0)
        self._call("cuMemExportToShareableHandle", byref(data), *arguments)
        return bytes(data)

    def import_fabric(self, data: bytes) -> int:
        handle, kind = c_ulonglong(), c_int(abi.HANDLE_TYPES[HandleKind.FABRIC])
        shared = abi.Bytes64.from_buffer_copy(data)
        self._call("cuMemImportFromShareableHandle", byref(handle), byref(shared), kind)
        return handle.value

    def alloc(self, num_bytes: int) -> int:
        address = c_ulonglong()
        self._call("cuMemAlloc_v2", byref(address), c_size_t(num_bytes))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", c_ulonglong(address))

    def ipc_handle(self, address: int) -> bytes:
        data = abi.Bytes64()
        self._call("cuIpcGetMemHandle", byref(data), c_ulonglong(address))
        return bytes(data)

    def ipc_open(self, data: bytes) -> int:
        address, shared = c_ulonglong(), abi.Bytes64.from_buffer_copy(data)
        self._call("cuIpcOpenMemHandle_v2", byref(address), shared, c_uint(abi.LAZY_PEER_ACCESS))
        return address.value

    def ipc_close(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", c_ulonglong(address))

    def register_host(self, address: int, num_bytes: int) -> int:
        host, found = c_void_p(address), c_ulonglong()
        flags = c_uint(abi.PORTABLE_AND_MAPPED)
        self._call("cuMemHostRegister_v2", host, c_size_t(num_bytes), flags)
        self._call("cuMemHostGetDevicePointer_v2", byref(found), host, c_uint(0))
        return found.value

    def unregister_host(self, address: int) -> None:
        self._call("cuMemHostUnregister", c_void_p(address))

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        device = torch.device("cuda", self.device)
        storage = torch._C._construct_storage_from_data_pointer(address, device, num_bytes)
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (num_bytes,))

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=f"cuda:{self.device}")

    def create_stream(self) -> int:
        least, greatest, stream = c_int(), c_int(), c_void_p()
        self._call("cuCtxGetStreamPriorityRange", byref(least), byref(greatest))
        self._call("cuStreamCreateWithPriority", byref(stream), c_uint(abi.NON_BLOCKING), greatest)
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        self._external.pop(stream, None)
        self._call("cuStreamDestroy_v2", c_void_p(stream))

    def current_stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device)

    def on_stream(self, stream: int) -> AbstractContextManager[object]:
        if stream not in self._external:  # making one takes longer than a kernel's launch
            self._external[stream] = torch.cuda.ExternalStream(stream, device=self.device)
        return torch.cuda.stream(self._external[stream])

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def is_capturing(self, stream: int) -> bool:
        status = c_int()
        self._call("cuStreamIsCapturing", c_void_p(stream), byref(status))
        return status.value != 0

    def is_idle(self, stream: int) -> bool:
        code = self._cuda.cuStreamQuery(c_void_p(stream))
        if code not in (0, abi.NOT_READY):
            raise CudaError(f"work on GPU {self.device} has failed: error {code}")
        return code == 0

    def create_event(self) -> int:
        event = c_void_p()
        self._call("cuEventCreate", byref(event), c_uint(abi.DISABLE_TIMING))
        return event.value or 0

    def destroy_event(self, event: int) -> None:
        self._cuda.cuEventDestroy_v2(c_void_p(event))  # unchecked: also at the process's end

    def record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", c_void_p(event), c_void_p(stream))

    def wait(self, stream: int, event: int) -> None:
        self._call("cuStreamWaitEvent", c_void_p(stream), c_void_p(event), c_uint(0))

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        sizes = c_ulonglong(target), c_ulonglong(source), c_size_t(num_bytes)
        self._call("cuMemcpyDtoDAsync_v2", *sizes, c_void_p(stream))

    def write_word(self, stream: int, address: int, value: int) -> None:
        arguments = c_void_p(stream), c_ulonglong(address), c_ulonglong(value), c_uint(0)
        self._call("cuStreamWriteValue64_v2", *arguments)

"""Device memory of the fake driver: host memory by memfd, so that it crosses processes."""

import ctypes
import mmap
import os
from typing import Any

from cuda.bindings import driver as cuda

GRANULARITY = 2 << 20
_MAP_FIXED = 0x10
OK = cuda.CUresult.CUDA_SUCCESS
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [*_libc.munmap.argtypes, ctypes.c_int]


class FakeMemory:
    """The calls of `cuda.bindings.driver` for memory."""

    def __init__(self) -> None:
        self.things: dict[int, object] = {}  # handles, streams, events
        self.sizes: dict[int, int] = {}  # reserved address → bytes
        self._mapped: set[int] = set()  # addresses

    def keep(self, thing: object) -> int:
        number = id(thing)
        self.things[number] = thing
        return number

    def _physical(self, handle: int) -> "_Physical":
        physical = self.things[handle]
        assert isinstance(physical, _Physical)
        return physical

    def cuMemGetAllocationGranularity(self, prop: Any, option: Any) -> tuple:
        return OK, GRANULARITY

    def cuMemCreate(self, size: int, prop: Any, flags: int) -> tuple:
        assert prop.type == cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        assert prop.location.type == cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        kinds = cuda.CUmemAllocationHandleType
        assert prop.requestedHandleTypes == kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        if size == 0 or size % GRANULARITY:
            return (cuda.CUresult.CUDA_ERROR_INVALID_VALUE,)
        fd = os.memfd_create("fake-gpu", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        os.pwrite(fd, b"\xa5" * 4096, 0)  # a GPU's memory is not zeroed
        return OK, cuda.CUmemGenericAllocationHandle(self.keep(_Physical(fd)))

    def cuMemRelease(self, handle: int) -> tuple:
        os.close(self._physical(handle).fd)
        del self.things[handle]
        return (OK,)

    def cuMemExportToShareableHandle(self, handle: int, kind: Any, flags: int) -> tuple:
        return OK, os.dup(self._physical(handle).fd)

    def cuMemImportFromShareableHandle(self, fd: int, kind: Any) -> tuple:
        return OK, cuda.CUmemGenericAllocationHandle(self.keep(_Physical(os.dup(fd))))

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> tuple:
        found = _mmap(None, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self.sizes[found] = size
        return OK, cuda.CUdeviceptr(found)

    def cuMemAddressFree(self, address: int, size: int) -> tuple:
        assert self.sizes.pop(address) == size and address not in self._mapped
        assert _libc.munmap(address, size) == 0
        return (OK,)

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple:
        fd = self._physical(handle).fd
        assert self.sizes[address] == os.fstat(fd).st_size == size, "whole allocations only"
        _mmap(address, size, mmap.MAP_SHARED | _MAP_FIXED, fd)
        self._mapped.add(address)
        return (OK,)

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple:
        assert access[0].flags == cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        assert address in self._mapped and _libc.mprotect(address, size, protection) == 0
        return (OK,)

    def cuMemUnmap(self, address: int, size: int) -> tuple:
        assert self.sizes[address] == size
        self._mapped.remove(address)
        return (OK,)

    def cuMemHostRegister(self, address: int, size: int, flags: int) -> tuple:
        assert flags == cuda.CU_MEMHOSTREGISTER_PORTABLE | cuda.CU_MEMHOSTREGISTER_DEVICEMAP
        assert address % mmap.PAGESIZE == 0 and size % mmap.PAGESIZE == 0
        self.things[address] = "pinned"
        return (OK,)

    def cuMemHostGetDevicePointer(self, address: int, flags: int) -> tuple:
        return OK, cuda.CUdeviceptr(address)

    def cuMemHostUnregister(self, address: int) -> tuple:
        del self.things[address]
        return (OK,)


class _Physical:
    def __init__(self, fd: int) -> None:
        self.fd = fd


def _mmap(address: int | None, size: int, flags: int, fd: int) -> int:
    """Without access, until it is given."""
    found = _libc.mmap(address, size, 0, flags, fd, 0)
    assert found not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    return found

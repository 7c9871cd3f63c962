"""Device memory of the fake driver: host memory by memfd, so that it crosses processes."""

import ctypes
import mmap
import os

from sidp_sgl.weightpool.transport.cuda.driver import CudaDriver, CudaError, HandleKind

GRANULARITY = 2 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class FakeMemory(CudaDriver):
    """The driver's calls for memory."""

    def __init__(self) -> None:
        self._things: dict[int, object] = {}  # handles, streams, events
        self._sizes: dict[int, int] = {}  # mapped address → bytes
        self.failing: set[str] = set()  # calls that fail

    def _check(self, name: str) -> None:
        if name in self.failing:
            raise CudaError(f"{name}: CUDA_ERROR_NOT_PERMITTED (800)")

    def _keep(self, thing: object) -> int:
        number = id(thing)
        self._things[number] = thing
        return number

    def granularity(self, kind: HandleKind) -> int:
        return GRANULARITY

    def create(self, num_bytes: int, kind: HandleKind) -> int:
        assert num_bytes > 0 and num_bytes % GRANULARITY == 0, "CUDA_ERROR_INVALID_VALUE"
        fd = os.memfd_create("fake-gpu", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        os.pwrite(fd, b"\xa5" * 4096, 0)  # a GPU's memory is not zeroed
        return self._keep(_Physical(fd))

    def _physical(self, handle: int) -> "_Physical":
        physical = self._things[handle]
        assert isinstance(physical, _Physical)
        return physical

    def map(self, handle: int, num_bytes: int, granularity: int) -> int:
        self._check("cuMemSetAccess")
        fd = self._physical(handle).fd
        assert os.fstat(fd).st_size == num_bytes, "only whole allocations can be mapped"
        return self._map_fd(fd, num_bytes)

    def _map_fd(self, fd: int, num_bytes: int) -> int:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc.mmap(None, num_bytes, protection, mmap.MAP_SHARED, fd, 0)
        assert address not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        self._sizes[address] = num_bytes
        return address

    def unmap(self, address: int, num_bytes: int) -> None:
        assert self._sizes.pop(address) == num_bytes
        assert _libc.munmap(address, num_bytes) == 0

    def release(self, handle: int) -> None:
        os.close(self._physical(handle).fd)
        del self._things[handle]

    def export_fd(self, handle: int) -> int:
        self._check("cuMemExportToShareableHandle")
        return os.dup(self._physical(handle).fd)

    def import_fd(self, fd: int) -> int:
        self._check("cuMemImportFromShareableHandle")
        return self._keep(_Physical(os.dup(fd)))

    def export_fabric(self, handle: int) -> bytes:
        self._check("cuMemExportToShareableHandle")
        return f"{os.getpid()} {self._physical(handle).fd}".encode().ljust(64, b"\0")

    def import_fabric(self, data: bytes) -> int:
        return self._keep(_Physical(_open(data)))

    def alloc(self, num_bytes: int) -> int:
        size = -(-num_bytes // 4096) * 4096
        physical = _Physical(os.memfd_create("fake-gpu", os.MFD_CLOEXEC))
        os.ftruncate(physical.fd, size)
        address = self._map_fd(physical.fd, size)
        self._things[address] = physical
        return address

    def free(self, address: int) -> None:
        self.unmap(address, self._sizes[address])
        self.release(address)

    def ipc_handle(self, address: int) -> bytes:
        return self.export_fabric(address)

    def ipc_open(self, data: bytes) -> int:
        fd = _open(data)
        try:
            return self._map_fd(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def ipc_close(self, address: int) -> None:
        self.unmap(address, self._sizes[address])

    def register_host(self, address: int, num_bytes: int) -> int:
        assert address % mmap.PAGESIZE == 0 and num_bytes % mmap.PAGESIZE == 0
        self._things[address] = "pinned"
        return address

    def unregister_host(self, address: int) -> None:
        del self._things[address]


class _Physical:
    def __init__(self, fd: int) -> None:
        self.fd = fd


def _open(data: bytes) -> int:
    pid, fd = data.rstrip(b"\0").decode().split()
    return os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)

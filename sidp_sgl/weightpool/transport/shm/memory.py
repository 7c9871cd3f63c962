"""Memory shared by file descriptor: anonymous (memfd), so nothing ever lies in /dev/shm.

The kernel frees it with the last process that maps it, whatever kills that process.
"""

import ctypes
import fcntl
import mmap
import os
import struct
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_LOCK_POLL_SECONDS = 20e-6
_PROT_NONE, _MAP_FIXED = 0, 0x10
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]


def create(name: str, num_bytes: int) -> int:
    """File descriptor of zeroed anonymous memory."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, max(num_bytes, 1))
    return fd


def map_tensor(fd: int, *, writable: bool) -> torch.Tensor:
    """[num_bytes] uint8 over the whole descriptor; lives as long as the tensor."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    mapped = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, protection)
    with warnings.catch_warnings():  # torch warns of read-only buffers; nobody writes to them here
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(mapped, dtype=torch.uint8)


def map_aliased(
    num_bytes: int, ranges: Sequence[Sequence[tuple[int, int]]]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """As `Transport.aliased`. The mappings stay until the process ends."""
    fd = create("sidp-aliased", num_bytes)
    whole = _Mapping(num_bytes)
    whole.map(0, fd, 0, num_bytes)
    aliases = []
    for parts in ranges:
        alias, at = _Mapping(sum(size for _, size in parts)), 0
        for offset, size in parts:
            alias.map(at, fd, offset, size)
            at += size
        aliases.append(alias.tensor())
    os.close(fd)
    return whole.tensor(), aliases


class _Mapping:
    """A range of addresses, into which parts of files are mapped. Python's own `mmap` has no
    MAP_FIXED."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._address = _mmap(
            None, num_bytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )

    def map(self, at: int, fd: int, offset: int, num_bytes: int) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_SHARED | _MAP_FIXED
        _mmap(self._address + at, num_bytes, protection, flags, fd, offset)

    def tensor(self) -> torch.Tensor:
        """[num_bytes] uint8."""
        memory = (ctypes.c_uint8 * self._num_bytes).from_address(self._address)
        return torch.frombuffer(memory, dtype=torch.uint8)


def _mmap(
    address: int | None, num_bytes: int, protection: int, flags: int, fd: int, offset: int
) -> int:
    """The address; raises OSError."""
    found = _LIBC.mmap(address, num_bytes, protection, flags, fd, offset)
    if found == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return found


class SharedIntegers:
    """A few 64-bit integers that processes and threads change under one lock.

    The lock is the kernel's (flock on a descriptor of one's own), so it is freed when its holder
    dies and works between threads as between processes.
    """

    def __init__(self, fd: int, count: int) -> None:
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self._map = mmap.mmap(self._fd, 8 * count)
        self._count = count

    def __getitem__(self, index: int) -> int:
        return struct.unpack_from("<q", self._map, 8 * index)[0]

    def __setitem__(self, index: int, value: int) -> None:
        struct.pack_into("<q", self._map, 8 * index, value)

    @contextmanager
    def locked(self, timeout: float) -> Iterator[bool]:
        """Hold the lock; False where it could not be had within `timeout` seconds, because its
        holder was stopped in the few instructions that it guards."""
        locked = self._try_lock(timeout)
        try:
            yield locked
        finally:
            if locked:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _try_lock(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(_LOCK_POLL_SECONDS)

    def close(self) -> None:
        if self._fd >= 0:
            self._map.close()
            os.close(self._fd)
            self._fd = -1

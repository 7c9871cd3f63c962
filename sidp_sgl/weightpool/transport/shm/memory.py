"""Memory shared by file descriptor: anonymous (memfd), so nothing ever lies in /dev/shm.

The kernel frees it with the last process that maps it, whatever kills that process.
"""

import fcntl
import mmap
import os
import struct
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK_POLL_SECONDS = 20e-6


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

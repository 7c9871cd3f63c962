"""Transport `cuda`: ranks on NVIDIA GPUs, peer memory mapped by the driver, a stream of its own for
copies, turns by a ticket lock in the owner's memory.

Same interface and event semantics as `shm`. What is enqueued while PyTorch captures a graph becomes
part of the graph: the pool forks and joins the copy stream around it (`captured.py`).
"""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from sidp_sgl.kernels import ticket_lock
from sidp_sgl.weightpool.alignment import ALIGNMENT, align
from sidp_sgl.weightpool.transport.cuda.driver import CudaDriver
from sidp_sgl.weightpool.transport.cuda.memory import PeerMemory, SharedMemory
from sidp_sgl.weightpool.transport.cuda.streams import (
    LOCK_SECONDS,
    Copier,
    CudaComputeStream,
    CudaCopyStream,
    CudaEvent,
    OwnerLock,
)
from sidp_sgl.weightpool.transport.interface import Transport

logger = logging.getLogger(__name__)
_LOCK_BYTES = align(8 * ticket_lock.LOCK_SIZE)


class CudaTransport(Transport):
    """One rank on a GPU. The driver is opened at the first use, when SGLang has chosen the device.

    Memory that is exported holds the owner's lock and, behind it, its blocks.
    """

    def __init__(self, open_driver: Callable[[], CudaDriver], copier: Copier | None = None) -> None:
        self._open_driver = open_driver
        self._copier = copier or Copier()
        self._locks: dict[int, OwnerLock] = {}  # by owner
        self._memory: SharedMemory | None = None
        self._peers: list[PeerMemory] = []
        self._closed = False

    @cached_property
    def driver(self) -> CudaDriver:
        return self._open_driver()

    @cached_property
    def compute_stream(self) -> CudaComputeStream:  # type: ignore[override]
        return CudaComputeStream(self.driver)

    @cached_property
    def copy_stream(self) -> CudaCopyStream:  # type: ignore[override]
        return CudaCopyStream(self.driver, self._locks, self._copier)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        assert self._memory is None, "a transport allocates once"
        self._memory = SharedMemory(self.driver, _LOCK_BYTES + num_bytes)
        ticket_lock.reset(_lock_of(self._memory.data))
        return self._memory.data[_LOCK_BYTES:]

    def empty(self, num_bytes: int) -> torch.Tensor:
        memory = self.driver.empty(num_bytes)
        # PyTorch may have reused memory that its own stream still works on; the copy stream does
        # not wait for that.
        self.driver.synchronize()
        return memory

    def export(self) -> list[int]:
        assert self._memory is not None, "allocate first"
        self.driver.synchronize()  # peers read the blocks without any further word
        return self._memory.file_descriptors()

    def connect(self, owner: int, file_descriptors: Sequence[int]) -> torch.Tensor:
        peer = PeerMemory(self.driver, owner, file_descriptors)
        self._peers.append(peer)
        if peer.has_atomics:
            if not self._locks:
                self._load_lock_kernels()
            self._locks[owner] = self._reader_of(peer.data)
        else:
            logger.warning(
                "GPU %d has no atomic operations on the memory of DP rank %d: its blocks are "
                "fetched without taking turns",
                self.driver.device,
                owner,
            )
        return peer.data[_LOCK_BYTES:]

    def _reader_of(self, memory: torch.Tensor) -> OwnerLock:
        """An owner's memory → its lock and this reader's part of it."""
        # 256 bytes each, so that kernels compiled for one take every other.
        reader = self.empty(ALIGNMENT).zero_().view(torch.int64)
        self.driver.synchronize()  # the copy stream reads it, PyTorch's has zeroed it
        return _lock_of(memory), reader

    def _load_lock_kernels(self) -> None:
        """Compile and load them now, on a lock of their own: while one is held others wait."""
        lock, reader = self._reader_of(self.empty(_LOCK_BYTES))
        ticket_lock.reset(lock)
        ticket_lock.acquire(lock, reader, LOCK_SECONDS)
        ticket_lock.release(lock, reader)
        self.driver.synchronize()

    def event(self) -> CudaEvent:
        return CudaEvent(self.driver)

    @property
    def shared_bytes(self) -> int:
        return self._memory.num_bytes if self._memory is not None else 0

    def is_capturing(self) -> bool:
        return self.driver.is_capturing(self.driver.current_stream())

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        return self.driver.captured(work)

    def synchronize(self) -> None:
        self.driver.synchronize()

    def skipped_turns(self) -> int:
        """Waits for the device."""
        return sum(int(reader[2]) for _, reader in self._locks.values())

    def close(self) -> None:
        if self._closed or (self._memory is None and not self._peers):
            return
        self._closed = True
        # Unmapping memory that is still in use is a fault of the device; then rather leave it to
        # the end of the process.
        try:
            is_unused = self.copy_stream.close()
            if is_unused:
                self.driver.synchronize()
        except RuntimeError:
            logger.exception(
                "work on GPU %d has failed; its memory stays mapped", self.driver.device
            )
            return
        if is_unused:
            for peer in self._peers:
                peer.close()
            if self._memory is not None:
                self._memory.close()


def _lock_of(memory: torch.Tensor) -> torch.Tensor:
    """[LOCK_SIZE] int64 at the beginning of an owner's memory."""
    return memory[: 8 * ticket_lock.LOCK_SIZE].view(torch.int64)

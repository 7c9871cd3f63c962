"""Calls between GPU ranks: rows and results in device memory that both sides map, flags in pinned
host memory, which GPUs write in the order of their streams.

A call is there when its number is: the requester's GPU writes it after the rows, the owner's after
the results, by a stream memory operation, which has a memory barrier by default. The hosts wait,
bounded, as on CPUs; no stream ever waits for another rank.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sidp_sgl.weightpool.alignment import align
from sidp_sgl.weightpool.cas.mailbox import Mailbox
from sidp_sgl.weightpool.cas.staging import Staging
from sidp_sgl.weightpool.cas.unit import PooledUnit
from sidp_sgl.weightpool.transport.cuda.captured_service import capture_units
from sidp_sgl.weightpool.transport.cuda.driver import CudaDriver
from sidp_sgl.weightpool.transport.cuda.memory import PeerMemory, SharedMemory
from sidp_sgl.weightpool.transport.timer_slack import sleep_exactly


class CudaMailbox(Mailbox):
    """One GPU rank's end. `graphs`: whether the service's units become CUDA graphs."""

    def __init__(
        self, driver: CudaDriver, rank: int, staging: Staging, *, graphs: bool = True
    ) -> None:
        super().__init__(rank, staging.num_ranks)
        inbox_bytes, results_bytes = staging.inbox_bytes, staging.results_bytes
        self._rows_per_rank = staging.rows_per_rank
        sleep_exactly()  # the thread that calls owners
        self._driver, self._graphs = driver, graphs
        self._memory = SharedMemory(driver, align(inbox_bytes) + results_bytes)
        self._inbox_bytes = inbox_bytes
        self.inbox = self._memory.data[:inbox_bytes]
        self.results = self._memory.data[align(inbox_bytes) :]
        self._stream = driver.create_stream()  # of the service
        self._peer_memory: list[PeerMemory] = []
        self._addresses: dict[int, tuple[int, int]] = {}  # peer → host's and device's, of its flags

    def export(self) -> list[int]:
        self._driver.synchronize()
        return [*self._memory.file_descriptors(), *self._own.file_descriptors]

    def connect(self, peer: int, file_descriptors: Sequence[int]) -> None:
        memory = PeerMemory(self._driver, peer, file_descriptors[:2])
        self._peer_memory.append(memory)
        data = memory.data
        results = data[align(self._inbox_bytes) :]
        self._add_peer(peer, file_descriptors[2:], data[: self._inbox_bytes], results)
        flags = self._peers[peer].map
        address = ctypes.addressof(ctypes.c_char.from_buffer(flags))
        self._addresses[peer] = address, self._driver.register_host(address, len(flags))

    def prepare(self, units: Sequence[PooledUnit]) -> Sequence[PooledUnit]:
        if not self._graphs:
            return units
        with torch.no_grad(), self._driver.on_stream(self._stream):
            prepared = capture_units(
                units, self._rows_per_rank, self.inbox.device, self._driver.graph
            )
            self._driver.synchronize()
        return prepared

    @contextmanager
    def serving(self) -> Iterator[None]:
        """The service's thread computes on a stream of its own, of highest priority."""
        sleep_exactly()
        self._driver.bind_thread()
        with self._driver.on_stream(self._stream):
            yield

    def _rows_have_left(self, owner: int, number: int) -> bool:
        self._driver.is_idle(self._driver.current_stream())  # raises where its work has failed
        return super()._rows_have_left(owner, number)

    def _tell(self, peer: int, index: int, number: int) -> None:
        stream = self._driver.current_stream()
        self._driver.write_value(stream, self._addresses[peer][1] + 8 * index, number)

    def close(self) -> None:
        """The service must have ended. Idempotent."""
        if not self._own.file_descriptors:
            return
        self._driver.synchronize()
        for address, _ in self._addresses.values():
            self._driver.unregister_host(address)
        for memory in self._peer_memory:
            memory.close()
        self._memory.close()
        self._driver.destroy_stream(self._stream)
        super().close()

"""Calls between CPU ranks: rows and results in shared memory."""

import os
from collections.abc import Sequence

from sidp_sgl.weightpool.cas.mailbox import Mailbox
from sidp_sgl.weightpool.cas.staging import Staging
from sidp_sgl.weightpool.transport.shm import memory as shm_memory


class ShmMailbox(Mailbox):
    """One CPU rank's end."""

    def __init__(self, rank: int, staging: Staging) -> None:
        super().__init__(rank, staging.num_ranks)
        inbox_bytes, results_bytes = staging.inbox_bytes, staging.results_bytes
        self._own_memory = [
            shm_memory.create("sidp-inbox", inbox_bytes),
            shm_memory.create("sidp-results", results_bytes),
        ]
        inbox, results = (shm_memory.map_tensor(fd, writable=True) for fd in self._own_memory)
        self.inbox, self.results = inbox[:inbox_bytes], results[:results_bytes]

    def export(self) -> list[int]:
        return [*self._own_memory, *self._own.file_descriptors]

    def connect(self, peer: int, file_descriptors: Sequence[int]) -> None:
        inbox, results = (shm_memory.map_tensor(fd, writable=True) for fd in file_descriptors[:2])
        for fd in file_descriptors[:2]:
            os.close(fd)  # the mappings have their own
        self._add_peer(peer, file_descriptors[2:], inbox, results)

    def _tell(self, peer: int, index: int, number: int) -> None:
        self._peers[peer].values[index] = number

    def close(self) -> None:
        super().close()
        for fd in self._own_memory:
            os.close(fd)
        self._own_memory = []

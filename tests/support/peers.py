"""Transports of one process connected to each other, as the ranks of a group would be."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sidp_sgl.weightpool.transport.interface import PeerStripe
from sidp_sgl.weightpool.transport.shm.owner_link import OwnerLink
from sidp_sgl.weightpool.transport.shm.transport import ShmTransport


class Owner:
    """A rank that owns `num_bytes` and lets others read them."""

    def __init__(self, num_bytes: int, rank: int = 0) -> None:
        self.rank = rank
        self.transport = ShmTransport()
        self.memory = self.transport.allocate(num_bytes)

    @contextmanager
    def reader(self, link: float | None = None) -> Iterator[tuple[ShmTransport, PeerStripe]]:
        """Another rank's transport, and this owner's memory as that rank sees it."""
        transport = ShmTransport(link)
        file_descriptors = [os.dup(fd) for fd in self.transport.export()]
        data = transport.connect(self.rank, file_descriptors)
        try:
            yield transport, PeerStripe(self.rank, data)
        finally:
            transport.close()

    def link(self, link: float | None = None) -> OwnerLink:
        """This owner's link as one more reader holds it."""
        return OwnerLink(self.rank, self.transport.export()[1], link)


@contextmanager
def owner_of_bytes(num_bytes: int) -> Iterator[Owner]:
    owner = Owner(num_bytes)
    owner.memory.copy_(torch.arange(num_bytes) % 251)
    try:
        yield owner
    finally:
        owner.transport.close()

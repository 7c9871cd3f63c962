"""Device memory that other processes map: VMM allocations by file descriptor, fabric handles where
descriptors can't be had, legacy IPC where the driver has no VMM.

What a peer has to know beside the handle travels in a memfd, so that every offer of memory is the
same two file descriptors, whatever the kind.
"""

import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from sidp_sgl.weightpool.transport.cuda.driver import CudaDriver, CudaError, HandleKind
from sidp_sgl.weightpool.transport.interface import TransportError


@dataclass
class SharedMemory:
    """Memory of this rank's device that peers may map; zeroed."""

    driver: CudaDriver
    num_bytes: int
    kinds: tuple[HandleKind, ...] = tuple(HandleKind)
    kind: HandleKind = field(init=False)
    address: int = field(init=False)

    def __post_init__(self) -> None:
        refused = []
        self._fds: list[int] = []
        self._handle = 0
        for kind in self.kinds:
            if self.driver.supports(kind):
                try:
                    self._allocate(kind)
                except CudaError as error:  # e.g. fabric without its service, fds without rights
                    refused.append(f"{kind.value}: {error}")
                    continue
                self.data.zero_()
                self.driver.synchronize()  # it may be unmapped at once
                return
        raise TransportError(
            f"GPU {self.driver.device} can't share {self.num_bytes} bytes with other processes: "
            + ("; ".join(refused) or "its driver supports none of the ways")
        )

    def _allocate(self, kind: HandleKind) -> None:
        """Allocate and export; leaves nothing behind where either fails."""
        driver = self.driver
        about: dict[str, Any] = {
            "kind": kind.value,
            "num_bytes": self.num_bytes,
            "gpu": driver.uuid(driver.device),
        }
        if kind is HandleKind.IPC:
            address = driver.alloc(max(self.num_bytes, 1))
            try:
                about["handle"] = driver.ipc_handle(address).hex()
            except CudaError:
                driver.free(address)
                raise
            self._adopt(kind, address, 0, 0, about, None)
            return
        granularity = driver.granularity(kind)
        mapped = -(-max(self.num_bytes, 1) // granularity) * granularity
        handle = driver.create(mapped, kind)
        address = 0
        try:
            address = driver.map(handle, mapped, granularity)
            fd = None
            if kind is HandleKind.FABRIC:
                about["handle"] = driver.export_fabric(handle).hex()
            else:
                fd = driver.export_fd(handle)
        except CudaError:
            if address:
                driver.unmap(address, mapped)
            driver.release(handle)
            raise
        about |= {"mapped_bytes": mapped, "granularity": granularity}
        self._adopt(kind, address, handle, mapped, about, fd)

    def _adopt(
        self,
        kind: HandleKind,
        address: int,
        handle: int,
        mapped: int,
        about: dict[str, Any],
        fd: int | None,
    ) -> None:
        self.kind, self.address, self._handle, self._mapped = kind, address, handle, mapped
        about_fd = os.memfd_create("sidp-cuda", os.MFD_CLOEXEC)
        os.pwrite(about_fd, json.dumps(about).encode(), 0)
        self._fds = [about_fd, os.dup(about_fd) if fd is None else fd]

    @property
    def data(self) -> torch.Tensor:
        """[num_bytes] uint8; valid until `close`."""
        return self.driver.tensor(self.address, self.num_bytes)

    def file_descriptors(self) -> list[int]:
        """Two, to be given to each peer; they stay this object's."""
        return self._fds

    def close(self) -> None:
        """Unmap and release; no work may be under way that uses the memory. Idempotent."""
        if not self._fds:
            return
        if self.kind is HandleKind.IPC:
            self.driver.free(self.address)
        else:
            self.driver.unmap(self.address, self._mapped)
            self.driver.release(self._handle)
        for fd in self._fds:
            os.close(fd)
        self._fds = []


class PeerMemory:
    """A peer's SharedMemory as this rank's device sees it. `peer`: its rank, for messages.

    Takes the file descriptors over. Raises TransportError where the GPUs can't reach each other.
    """

    def __init__(self, driver: CudaDriver, peer: int, file_descriptors: list[int]) -> None:
        self._driver = driver
        about_fd, memory_fd = file_descriptors
        try:
            about = json.loads(os.pread(about_fd, os.fstat(about_fd).st_size, 0))
            self.num_bytes: int = about["num_bytes"]
            self.has_atomics = check_peer(driver, peer, about["gpu"])
            self._kind = HandleKind(about["kind"])
            try:
                self._map(about, memory_fd)
            except CudaError as error:
                raise TransportError(
                    f"GPU {driver.device} can't map the memory of DP rank {peer} "
                    f"({self._kind.value}): {error}; the ranks of a group need peer access and one "
                    "another's file descriptors: see `nvidia-smi topo -m`"
                ) from error
        finally:
            for fd in file_descriptors:
                os.close(fd)

    def _map(self, about: dict[str, Any], memory_fd: int) -> None:
        driver = self._driver
        if self._kind is HandleKind.IPC:
            self.address: int | None = driver.ipc_open(bytes.fromhex(about["handle"]))
            return
        self._mapped: int = about["mapped_bytes"]
        if self._kind is HandleKind.FABRIC:
            handle = driver.import_fabric(bytes.fromhex(about["handle"]))
        else:
            handle = driver.import_fd(memory_fd)
        try:
            self.address = driver.map(handle, self._mapped, about["granularity"])
        finally:
            driver.release(handle)  # the mapping keeps the memory

    @property
    def data(self) -> torch.Tensor:
        """[num_bytes] uint8; valid until `close`."""
        assert self.address is not None
        return self._driver.tensor(self.address, self.num_bytes)

    def close(self) -> None:
        """Unmap; no work may be under way that uses the memory. Idempotent."""
        if self.address is None:
            return
        if self._kind is HandleKind.IPC:
            self._driver.ipc_close(self.address)
        else:
            self._driver.unmap(self.address, self._mapped)
        self.address = None


def check_peer(driver: CudaDriver, peer: int, uuid: str) -> bool:
    """Raise TransportError where this GPU can't map that of rank `peer`; returns whether atomic
    operations between them are atomic. A GPU that this process does not see is left to the driver.
    """
    for ordinal in range(driver.device_count()):
        if driver.uuid(ordinal) != uuid:
            continue
        if ordinal == driver.device:
            return True
        if not driver.can_access_peer(ordinal):
            raise TransportError(
                f"GPU {driver.device} can't access the memory of GPU {ordinal} (DP rank {peer}): "
                "--sidp needs peer access between all GPUs of a group; see `nvidia-smi topo -m`"
            )
        return driver.has_peer_atomics(ordinal)
    return False

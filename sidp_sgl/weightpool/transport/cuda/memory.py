"""Device memory that other processes map: VMM allocations that travel as file descriptors.

What a peer has to know beside it travels in a memfd, so that an offer of memory is always two file
descriptors.
"""

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from sidp_sgl.weightpool.transport.cuda.driver import CudaDriver, CudaError
from sidp_sgl.weightpool.transport.interface import TransportError


class SharedMemory:
    """Memory of this rank's device that peers may map; zeroed.

    Raises TransportError where it can't be had or given away.
    """

    def __init__(self, driver: CudaDriver, num_bytes: int) -> None:
        self._driver, self.num_bytes = driver, num_bytes
        with ExitStack() as undo:
            try:
                handle, mapped_bytes = driver.create(max(num_bytes, 1))
                undo.callback(driver.release, handle)
                self._address = driver.map(handle, mapped_bytes)
                undo.callback(driver.unmap, self._address, mapped_bytes)
                memory_fd = driver.export_fd(handle)
            except CudaError as error:
                raise TransportError(
                    f"GPU {driver.device} can't share {num_bytes} bytes with other processes: "
                    f"{error}; --sidp needs that much free memory there and, in a container, the "
                    "right to export it by file descriptor"
                ) from error
            self._undo = undo.pop_all()
        uuid = driver.uuid(driver.device)
        about = {"num_bytes": num_bytes, "mapped_bytes": mapped_bytes, "gpu": uuid}
        about_fd = os.memfd_create("sidp-cuda", os.MFD_CLOEXEC)
        os.pwrite(about_fd, json.dumps(about).encode(), 0)
        self._fds = [about_fd, memory_fd]
        for fd in self._fds:
            self._undo.callback(os.close, fd)
        self.data.zero_()
        driver.synchronize()  # it may be unmapped at once

    @property
    def data(self) -> torch.Tensor:
        """[num_bytes] uint8; valid until `close`."""
        return self._driver.tensor(self._address, self.num_bytes)

    def file_descriptors(self) -> list[int]:
        """Two, to be given to each peer; they stay this object's."""
        return self._fds

    def close(self) -> None:
        """Unmap and release; no work may be under way that uses the memory. Idempotent."""
        self._undo.close()


class PeerMemory:
    """A peer's SharedMemory as this rank's device sees it. `peer`: its rank, for messages.

    Takes the file descriptors over. Raises TransportError where the GPUs can't reach each other.
    """

    def __init__(self, driver: CudaDriver, peer: int, file_descriptors: Sequence[int]) -> None:
        self._driver = driver
        self._undo = ExitStack()
        about_fd, memory_fd = file_descriptors
        try:
            about = json.loads(os.pread(about_fd, os.fstat(about_fd).st_size, 0))
            self.num_bytes: int = about["num_bytes"]
            self.has_atomics = check_peer(driver, peer, about["gpu"])
            handle = driver.import_fd(memory_fd)
            try:
                self._address = driver.map(handle, about["mapped_bytes"])
            finally:
                driver.release(handle)  # the mapping keeps the memory
        except CudaError as error:
            raise TransportError(
                f"GPU {driver.device} can't map the memory of DP rank {peer}: {error}; the ranks "
                "of a group need peer access and one another's file descriptors: see "
                "`nvidia-smi topo -m`"
            ) from error
        finally:
            for fd in file_descriptors:
                os.close(fd)
        self._undo.callback(driver.unmap, self._address, about["mapped_bytes"])

    @property
    def data(self) -> torch.Tensor:
        """[num_bytes] uint8; valid until `close`."""
        return self._driver.tensor(self._address, self.num_bytes)

    def close(self) -> None:
        """Unmap; no work may be under way that uses the memory. Idempotent."""
        self._undo.close()


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

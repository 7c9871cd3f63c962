"""Both transports behind one door, for the tests that hold for either."""

import torch

from sidp_sgl.weightpool.transport.cuda.streams import Copier, CudaComputeStream
from sidp_sgl.weightpool.transport.cuda.transport import CudaTransport
from sidp_sgl.weightpool.transport.interface import Transport
from sidp_sgl.weightpool.transport.shm.transport import ShmTransport
from tests.support.fake_cuda import FakeCuda

KINDS = ["shm", "cuda"]


class LaunchingStream(CudaComputeStream):
    """Tests wait for what they have launched."""

    driver: FakeCuda

    def synchronize(self) -> None:
        self.driver.synchronize()


class FakeCudaTransport(CudaTransport):
    """The CUDA transport over a driver without a GPU."""

    def __init__(self, driver: FakeCuda | None = None, copier: Copier | None = None) -> None:
        self.fake = driver or FakeCuda()
        super().__init__(lambda: self.fake, copier)
        self.__dict__["compute_stream"] = stream = LaunchingStream(self.fake)
        stream.driver = self.fake

    def close(self) -> None:
        super().close()
        self.fake.end_streams()


def make_transport(kind: str, seed: int | None = None) -> Transport:
    """`seed`: with late work and torn copies (cuda)."""
    return ShmTransport() if kind == "shm" else FakeCudaTransport(FakeCuda(seed=seed))


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.cpu(), right.cpu())

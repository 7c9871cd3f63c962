"""Which transport and which mailbox serve a rank's device."""

from sidp_sgl.weightpool.cas.mailbox import Mailbox
from sidp_sgl.weightpool.cas.staging import Staging
from sidp_sgl.weightpool.transport.interface import Transport
from sidp_sgl.weightpool.transport.shm.mailbox import ShmMailbox
from sidp_sgl.weightpool.transport.shm.transport import ShmTransport

PACED_SLICE = 16 << 20  # bytes; a fraction of a millisecond on the links of a GPU


def make_transport(device: str, link_bytes_per_second: float | None) -> Transport:
    """For ranks on `device`, 'cpu' or 'cuda'; the rate paces every owner's link (cpu) or every
    reader's fetches (cuda), or is None."""
    if device != "cuda":
        return ShmTransport(link_bytes_per_second)
    # Not above: Triton and the driver are asked for on GPUs only.
    from sidp_sgl.weightpool.transport.cuda.driver import CudaDriver
    from sidp_sgl.weightpool.transport.cuda.streams import Copier
    from sidp_sgl.weightpool.transport.cuda.transport import CudaTransport

    rate = link_bytes_per_second
    copier = Copier() if rate is None else Copier(bytes_per_second=rate, slice_bytes=PACED_SLICE)
    return CudaTransport(CudaDriver.of_pytorch, copier)


def make_mailbox(transport: Transport, rank: int, staging: Staging, graphs: bool) -> Mailbox:
    """For ranks whose blocks `transport` shares; after `transport.allocate`. `graphs`: whether CUDA
    graphs may be made, on GPUs."""
    if isinstance(transport, ShmTransport):
        return ShmMailbox(rank, staging)
    from sidp_sgl.weightpool.transport.cuda.mailbox import CudaMailbox
    from sidp_sgl.weightpool.transport.cuda.transport import CudaTransport

    assert isinstance(transport, CudaTransport)
    return CudaMailbox(transport.driver, rank, staging, graphs=graphs)

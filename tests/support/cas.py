"""CaS between ranks of one process: real calls and services, units over seeded weights."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from sidp_sgl.weightpool.cas.endpoint import CasEndpoint
from sidp_sgl.weightpool.cas.mailbox import Mailbox
from sidp_sgl.weightpool.cas.staging import Staging, make_staging
from sidp_sgl.weightpool.cas.unit import PooledUnit, RowType
from sidp_sgl.weightpool.transport.cuda.mailbox import CudaMailbox
from sidp_sgl.weightpool.transport.shm.mailbox import ShmMailbox
from tests.support.fake_cuda import FakeCuda

IN_WIDTH, OUT_WIDTH = 12, 20
KIND = "shm"  # of the calls; a test may set it


def weight(layer: int) -> torch.Tensor:
    """[IN_WIDTH, OUT_WIDTH], of whole numbers: sums are exact in any order."""
    generator = torch.Generator().manual_seed(layer)
    return torch.randint(-8, 8, (IN_WIDTH, OUT_WIDTH), generator=generator).float()


def make_rows(num_rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(-8, 8, (num_rows, IN_WIDTH), generator=generator).float()


def matmul_unit(layer: int, get_weight: Callable[[], torch.Tensor] | None = None) -> PooledUnit:
    """Unit number `layer`; its weight is asked for at every use."""

    def compute(rows: torch.Tensor) -> torch.Tensor:
        return rows @ (get_weight() if get_weight is not None else weight(layer))

    return rows_unit(layer, layer, IN_WIDTH, OUT_WIDTH, compute)


def rows_unit(
    number: int,
    block: int,
    in_width: int,
    out_width: int,
    compute: Callable[[torch.Tensor], torch.Tensor],
    *,
    is_last: bool = True,
    dtype: torch.dtype = torch.float32,
) -> PooledUnit:
    """A unit from rows to rows, whose forward is its partial result."""
    payload, result = (RowType(in_width, dtype),), RowType(out_width, dtype)
    return PooledUnit(number, block, is_last, payload, result, compute, compute)


def make_mailbox(rank: int, staging: Staging) -> Mailbox:
    """One rank's end of kind `shm` or, over a driver without a GPU, `cuda`."""
    if KIND == "shm":
        return ShmMailbox(rank, staging)
    return CudaMailbox(FakeCuda(seed=rank), rank, staging)


def settle(ranks: Sequence[CasEndpoint]) -> None:
    """Wait until what was told has arrived; on CPUs it has."""
    for endpoint in ranks:
        if isinstance(endpoint.mailbox, CudaMailbox):
            endpoint.mailbox._driver.synchronize()


@contextmanager
def connected_mailboxes(staging: Staging) -> Iterator[list[Mailbox]]:
    """The mailboxes of all ranks, each connected with each."""
    ends = [make_mailbox(rank, staging) for rank in range(staging.num_ranks)]
    try:
        for rank, end in enumerate(ends):
            for peer, other in enumerate(ends):
                if peer != rank:
                    end.connect(peer, [os.dup(fd) for fd in other.export()])
        yield ends
    finally:
        for end in ends:
            end.close()


@contextmanager
def endpoints(
    num_ranks: int,
    units: Sequence[PooledUnit],
    owners: Sequence[int],
    *,
    start: bool = True,
) -> Iterator[list[CasEndpoint]]:
    """Every rank's part in CaS; with `start`, their services run."""
    staging = make_staging((unit.row_bytes for unit in units), num_ranks)
    with connected_mailboxes(staging) as ends:
        ranks = [
            CasEndpoint(mailbox, staging, [u for u in units if owners[u.block] == rank])
            for rank, mailbox in enumerate(ends)
        ]
        if start:
            for endpoint in ranks:
                endpoint.service.start()
        try:
            yield ranks
        finally:
            for endpoint in ranks:
                endpoint.service.close()

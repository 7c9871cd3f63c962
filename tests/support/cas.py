"""CaS between ranks of one process: real calls and services, units over seeded weights."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from sidp_sgl.weightpool.cas.calls import Calls
from sidp_sgl.weightpool.cas.compute_group import ComputeGroup
from sidp_sgl.weightpool.cas.staging import Staging, make_staging
from sidp_sgl.weightpool.cas.unit import PooledUnit
from sidp_sgl.weightpool.transport.cuda.calls import CudaCalls
from sidp_sgl.weightpool.transport.shm.calls import ShmCalls
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

    return PooledUnit(
        layer, layer, True, IN_WIDTH, OUT_WIDTH, torch.float32, compute, compute, lambda rows: rows
    )


def make_calls(rank: int, num_ranks: int, staging: Staging) -> Calls:
    """One rank's end of kind `shm` or, over a driver without a GPU, `cuda`."""
    sizes = staging.inbox_bytes, staging.results_bytes
    if KIND == "shm":
        return ShmCalls(rank, num_ranks, *sizes)
    return CudaCalls(FakeCuda(seed=rank), rank, num_ranks, *sizes)


def settle(groups: Sequence[ComputeGroup]) -> None:
    """Wait until what was told has arrived; on CPUs it has."""
    for group in groups:
        if isinstance(group.calls, CudaCalls):
            group.calls._driver.synchronize()


@contextmanager
def connected_calls(num_ranks: int, staging: Staging) -> Iterator[list[Calls]]:
    """The calls of all ranks, each connected with each."""
    ends = [make_calls(rank, num_ranks, staging) for rank in range(num_ranks)]
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
def compute_groups(
    num_ranks: int,
    units: Sequence[PooledUnit],
    owners: Sequence[int],
    *,
    start: bool = True,
) -> Iterator[list[ComputeGroup]]:
    """Every rank's part in CaS; with `start`, their services run."""
    staging = make_staging((unit.row_bytes for unit in units), num_ranks)
    with connected_calls(num_ranks, staging) as ends:
        groups = [
            ComputeGroup(
                calls,
                staging,
                [unit for unit in units if owners[unit.layer] == rank],
                lambda start, end: None,
            )
            for rank, calls in enumerate(ends)
        ]
        if start:
            for group in groups:
                group.service.start()
        try:
            yield groups
        finally:
            for group in groups:
                group.service.close()

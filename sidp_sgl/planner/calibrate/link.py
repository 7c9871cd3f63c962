"""What lies between two ranks: the engine's own pool, transport, calls and compute service, with
weights made up. The same on CPUs and on GPUs.

Room: calibration.
"""

from collections.abc import Callable
from functools import partial

import torch

from sidp_sgl.planner.calibrate.decoder import Decoder
from sidp_sgl.scheduler.lifecycle.rendezvous import Offer, exchange
from sidp_sgl.scheduler.member import Member
from sidp_sgl.weightpool.cas.endpoint import CasEndpoint
from sidp_sgl.weightpool.cas.staging import ROWS_PER_RANK, make_staging
from sidp_sgl.weightpool.cas.unit import PooledUnit, RowType
from sidp_sgl.weightpool.layout import make_layout
from sidp_sgl.weightpool.placement import Placement
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.transport.devices import make_mailbox
from sidp_sgl.weightpool.transport.interface import Transport

MEETING_SECONDS = 60.0

Compute = Callable[[int], object]  # of one layer
Watch = Callable[[Callable[[], object]], object]  # runs what it is given, and takes its time


def num_layers_of(num_ranks: int) -> int:
    """Layers of a measured pass: enough for slots to matter, as many for each rank."""
    return num_ranks * max(2, -(-8 // num_ranks))


class Fetches:
    """One rank's fetches of blocks of `num_bytes`; every rank owns as many layers. `meeting`: a
    name that all ranks give alike."""

    def __init__(
        self, meeting: str, rank: int, num_ranks: int, num_bytes: int, transport: Transport
    ) -> None:
        placement = Placement.of([num_bytes] * num_layers_of(num_ranks), num_ranks)
        self._pool = WeightPool(transport, rank, placement)
        block = make_layout([("weight", torch.empty(num_bytes, dtype=torch.uint8, device="meta"))])
        for memory in self._pool.own(dict.fromkeys(placement.owned(rank), block)).values():
            memory.fill_(1)  # pages that were never written are no memory yet
        offer = Offer(Member(rank), {}, self._pool.offer(), transport.export())
        for peer, theirs in exchange(meeting, offer, num_ranks, MEETING_SECONDS).items():
            self._pool.connect(peer, theirs.content, theirs.file_descriptors)
        self._pool.start()

    def run(self, compute: Compute, watch: Watch) -> None:
        """One pass, each layer computed when its block is there, which `watch` waits for."""
        for layer in range(len(self._pool.placement.blocks)):
            watch(partial(self._pool.enter, layer))
            compute(layer)
            self._pool.leave(layer)

    def close(self) -> None:
        """Once all ranks have ended their passes."""
        self._pool.close()


class SentRows:
    """The FFNs of others' layers, computed by their owners. `meeting` as above; `transport` is not
    yet connected."""

    def __init__(
        self,
        meeting: str,
        rank: int,
        num_ranks: int,
        decoder: Decoder,
        hidden_size: int,
        transport: Transport,
    ) -> None:
        num_layers = num_layers_of(num_ranks)
        self._placement = Placement.of([1] * num_layers, num_ranks)
        self._rank, self._transport = rank, transport
        self._units = [_unit(layer, decoder, hidden_size) for layer in range(num_layers)]
        staging = make_staging((unit.row_bytes for unit in self._units), num_ranks)
        mailbox = make_mailbox(transport, rank, num_ranks, staging, graphs=True)
        owned = [self._units[layer] for layer in self._placement.owned(rank)]
        self._endpoint = CasEndpoint(mailbox, staging, owned)
        offer = Offer(Member(rank), {}, {}, mailbox.export())
        for peer, theirs in exchange(meeting, offer, num_ranks, MEETING_SECONDS).items():
            mailbox.connect(peer, theirs.file_descriptors)
        self._endpoint.service.start()
        # Every requester has rows of its own at every owner.
        self._offsets = {
            owner: ROWS_PER_RANK * (rank - (rank > owner))
            for owner in range(num_ranks)
            if owner != rank
        }

    def run(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] → the same; computed here where the layer is this rank's."""
        unit, owners = self._units[layer], self._placement.owners(layer)
        if self._placement.owns(self._rank, layer):
            return unit.partial(rows)
        requester = self._endpoint.requester
        requester.begin_step(self._offsets, len(rows))
        result = requester.call(owners, unit, [rows])
        requester.end_step()
        if result is None:
            raise RuntimeError(
                f"rank {owners[0]} did not compute the rows that rank {self._rank} sent"
            )
        return result

    def close(self) -> None:
        """Once all ranks have ended their passes."""
        self._endpoint.service.close()
        self._endpoint.mailbox.close()
        self._transport.close()


def _unit(layer: int, decoder: Decoder, hidden_size: int) -> PooledUnit:
    compute = partial(decoder.ffn, layer)
    row = RowType(hidden_size, torch.bfloat16)
    return PooledUnit(layer, layer, True, (row,), row, compute, compute)

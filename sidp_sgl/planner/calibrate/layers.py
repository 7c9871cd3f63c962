"""Layers to measure: computed here, fetched, and sent; weights made up, alike on CPUs and GPUs.

The layers are plain operators, alike in shape to SGLang's; their own time is not what a step of
SGLang takes, which is measured in SGLang. What lies between two ranks is the engine's own: pool,
transport, calls and compute service.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from sidp_sgl.planner.calibrate.points import num_layers_of
from sidp_sgl.planner.models import ModelShape
from sidp_sgl.planner.weights import Split, layer_weights
from sidp_sgl.scheduler.lifecycle.rendezvous import Offer, exchange
from sidp_sgl.scheduler.member import Member
from sidp_sgl.weightpool.cas.endpoint import CasEndpoint
from sidp_sgl.weightpool.cas.staging import make_staging
from sidp_sgl.weightpool.cas.unit import PooledUnit, RowType
from sidp_sgl.weightpool.layout import make_layout
from sidp_sgl.weightpool.placement import Placement
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.transport.devices import make_mailbox
from sidp_sgl.weightpool.transport.interface import Transport

CONTEXT_TOKENS = 128  # of a request, as in the engine's own measuring
_MOST_BYTES = 1 << 28  # of weights; layers beyond use those of the first ones again
MEETING_SECONDS = 60.0

Compute = Callable[[int], object]  # of one layer
Watch = Callable[[Callable[[], object]], object]  # runs what it is given, and takes its time


class Decoder:
    """`batch` requests on `device`, all in BF16."""

    def __init__(self, shape: ModelShape, num_layers: int, batch: int, device: torch.device):
        weights = layer_weights(shape, 0, Split())
        gemms = weights.attention + weights.ffn
        num_bytes = sum(gemm.num_bytes for gemm in gemms)
        distinct = min(num_layers, max(1, _MOST_BYTES // num_bytes))

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, dtype=torch.bfloat16, device=device) * 0.02

        self._layers = [
            [random(gemm.out_width, gemm.in_width) for gemm in gemms] for _ in range(distinct)
        ]
        self._norm = torch.ones(shape.hidden_size, dtype=torch.bfloat16, device=device)
        self._heads, self._kv_heads, self._width = (
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
        )
        self._keys = random(batch * CONTEXT_TOKENS, shape.num_kv_heads, shape.head_dim)
        self._tokens = torch.randperm(len(self._keys), device=device).view(batch, CONTEXT_TOKENS)
        self.rows = random(batch, shape.hidden_size)

    def attend(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """[batch, hidden_size] → the same; norms and projections included."""
        qkv, o, _, _ = self._layers[layer % len(self._layers)]
        projected = linear(rms_norm(rows, self._norm.shape, self._norm), qkv)
        queries = projected[:, : self._heads * self._width].view(-1, self._heads, 1, self._width)
        if rows.device.type == "cpu":  # as SGLang's torch_native backend: one after another
            parts = [self._one(queries[n : n + 1], self._tokens[n]) for n in range(len(rows))]
            attended = torch.cat(parts)
        else:
            attended = self._one(queries, self._tokens)
        rows = rows + linear(attended.reshape(len(rows), -1), o)
        return rms_norm(rows, self._norm.shape, self._norm)

    def _one(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        keys = self._keys[tokens].view(len(queries), -1, self._kv_heads, self._width)
        keys = keys.transpose(1, 2)
        return scaled_dot_product_attention(queries, keys, keys, enable_gqa=True)

    def ffn(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] → the same."""
        _, _, gate_up, down = self._layers[layer % len(self._layers)]
        gate, value = linear(rows, gate_up).chunk(2, dim=-1)
        return linear(silu(gate) * value, down)


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
        mailbox = make_mailbox(transport, rank, staging, graphs=True)
        owned = [self._units[layer] for layer in self._placement.owned(rank)]
        self._endpoint = CasEndpoint(mailbox, staging, owned)
        offer = Offer(Member(rank), {}, {}, mailbox.export())
        for peer, theirs in exchange(meeting, offer, num_ranks, MEETING_SECONDS).items():
            mailbox.connect(peer, theirs.file_descriptors)
        self._endpoint.service.start()

    def run(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] → the same; computed here where the layer is this rank's."""
        unit, owners = self._units[layer], self._placement.owners(layer)
        if self._placement.owns(self._rank, layer):
            return unit.partial(rows)
        requester = self._endpoint.requester
        requester.begin_step(len(rows))
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

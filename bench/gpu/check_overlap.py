"""How much of a step the fetches cost: WaS as a graph over a link of given rate, beside the same
step with resident weights, over the batch size."""

import os
from typing import Any

import torch
from torch.nn import functional

from bench.gpu.device import Gpu
from bench.gpu.models import DECODERS, LINK_BYTES_PER_SECOND, Decoder, scaled
from sidp_sgl.weightpool.layout import make_layout
from sidp_sgl.weightpool.placement import owners
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.schedule import DEFAULT_SLOTS
from sidp_sgl.weightpool.transport.cuda.streams import Copier
from sidp_sgl.weightpool.transport.cuda.transport import CudaTransport
from sidp_sgl.weightpool.transport.devices import PACED_SLICE

BATCHES = (1, 16, 64, 128, 256, 512, 768, 1024)
LAYERS, RANKS, CONTEXT_TOKENS = 12, 4, 1024
STALL_TARGET, HIDDEN_TARGET = 0.03, 0.02
COPIER = Copier(bytes_per_second=LINK_BYTES_PER_SECOND, slice_bytes=PACED_SLICE)


class Reader:
    """Rank 0 of a group in one process; the other ranks only own."""

    def __init__(self, gpu: Gpu, decoder: Decoder) -> None:
        self.gpu, self.decoder = gpu, decoder
        layer_owners = owners(LAYERS, RANKS, "interleaved")
        self.transports = [
            CudaTransport(gpu.driver, COPIER if number == 0 else None) for number in range(RANKS)
        ]
        pools = [
            WeightPool(transport, number, RANKS, layer_owners, "ticketed", DEFAULT_SLOTS)
            for number, transport in enumerate(self.transports)
        ]
        self.pool = pools[0]
        shapes = {
            "up": torch.empty(2 * decoder.intermediate, decoder.hidden, device="meta"),
            "down": torch.empty(decoder.hidden, decoder.intermediate, device="meta"),
        }
        layout = make_layout((name, tensor.bfloat16()) for name, tensor in shapes.items())
        self.views: dict[int, dict[str, torch.Tensor]] = {}
        for pool in pools:
            owned = pool.own({n: layout for n in range(LAYERS) if pool.owns(n)})
            for block in owned.values():
                for weight in block.values():
                    weight.normal_(0.0, 0.02)
            if pool is self.pool:
                self.views.update(owned)
        for number, pool in enumerate(pools[1:], start=1):
            fds = [os.dup(fd) for fd in self.transports[number].export()]
            self.pool.connect(number, pool.offer(), fds)
        self.views.update(self.pool.start())
        self.fetch_seconds = layout.num_bytes / LINK_BYTES_PER_SECOND
        self.num_fetches = sum(owner != 0 for owner in layer_owners)
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": gpu.device}
        width = decoder.query + decoder.key_value
        self.qkv = torch.randn(width, decoder.hidden, **options) * 0.02
        self.out = torch.randn(decoder.hidden, decoder.query, **options) * 0.02
        tokens = max(BATCHES) * CONTEXT_TOKENS
        self.cache = torch.ones(int(tokens * gpu.scale), decoder.key_value, **options)

    def step(self, rows: torch.Tensor, *, is_fetched: bool) -> torch.Tensor:
        """A decode step but for embedding and head; reading the KV cache stands for attention."""
        for layer in range(LAYERS):
            query = functional.linear(rows, self.qkv)[:, : self.decoder.query]
            tokens = int(len(rows) * CONTEXT_TOKENS * self.gpu.scale)
            attention = self.cache[:tokens].sum(dtype=torch.float32) * 1e-9
            rows = rows + functional.linear(query, self.out) + attention.to(rows.dtype)
            rows = functional.rms_norm(rows, rows.shape[-1:])
            if is_fetched:
                self.pool.enter(layer)
            gate, value = functional.linear(rows, self.views[layer]["up"]).chunk(2, dim=-1)
            rows = rows + functional.linear(
                functional.silu(gate) * value, self.views[layer]["down"]
            )
            if is_fetched:
                self.pool.leave(layer)
        return rows

    def close(self) -> None:
        self.gpu.synchronize()
        for transport in self.transports:
            transport.close()


def _times(reader: Reader, batch: int) -> tuple[float, float]:
    """Seconds of a step with resident weights, and in WaS."""
    gpu = reader.gpu
    rows = torch.randn(batch, reader.decoder.hidden, dtype=torch.bfloat16, device=gpu.device)
    resident = gpu.capture(lambda: reader.step(rows, is_fetched=False))

    def fetched() -> None:
        with reader.pool.step():
            reader.step(rows, is_fetched=True)

    replay = gpu.capture(fetched)

    def was() -> None:
        reader.pool.begin_replay()
        replay()

    return gpu.seconds(resident, 8), gpu.seconds(was, 8)


def measure(gpu: Gpu, decoder: Decoder) -> dict[str, Any]:
    """Step times over the batch, beside what all fetches of a step take at the link's rate."""
    reader = Reader(gpu, scaled(decoder, gpu.scale))
    fetches = reader.num_fetches * reader.fetch_seconds
    points: list[dict[str, Any]] = []
    with torch.inference_mode():
        for batch in BATCHES:
            resident, was = _times(reader, batch)
            points.append(
                {
                    "batch": batch,
                    "resident_ms": round(1e3 * resident, 3),
                    "was_ms": round(1e3 * was, 3),
                    "floor_ms": round(1e3 * max(resident, fetches), 3),
                    "stall_share": round(1 - resident / was, 4),
                    "is_hidden": resident >= fetches,
                }
            )
    reader.close()
    hidden = [point for point in points if point["is_hidden"]]
    worst = max((point["stall_share"] for point in hidden), default=None)
    return {
        "fetches_ms": round(1e3 * fetches, 3),
        "points": points,
        "crossover_batch": hidden[0]["batch"] if hidden else None,
        "worst_stall_share_above_it": worst,
        "target": f"stall share below {STALL_TARGET:.0%} above the threshold, a hidden step at "
        f"most {HIDDEN_TARGET:.0%} slower",
        "target_met": worst is not None and worst < min(STALL_TARGET, HIDDEN_TARGET),
    }


def overlap(gpu: Gpu) -> dict[str, Any]:
    """The FFN sizes of three models, the link paced at 400 GB/s."""
    result: dict[str, Any] = {decoder.name: measure(gpu, decoder) for decoder in DECODERS}
    return {
        **result,
        "target_met": all(model["target_met"] for model in result.values()),
        "ok": True,
        "note": f"one reader, {LAYERS} layers of which {RANKS - 1} of {RANKS} are fetched, KV of "
        f"{CONTEXT_TOKENS} tokens read per row; a link within one GPU is a stand-in, a hard one: "
        "its copies read and write the memory that the compute reads, and the driver does them by "
        "multiprocessors (between GPUs a copy engine does); slices keep to a timetable",
    }

"""Between GPUs: peer copies on a stream of their own. Every rank reads from and writes to memory
that it has itself on the other GPUs, so no handles are exchanged.

Room: calibration. Written for GPUs with peer access; the engine's own CUDA transport will replace
it where it lands.
"""

import torch

from sidp_sgl.calibration.decoder import Decoder
from sidp_sgl.calibration.link import Compute, Fetches, SentRows, num_layers_of
from sidp_sgl.weightpool.placement import owners


class CudaFetches(Fetches):
    """Blocks of others' layers, copied one after another while the layers are computed."""

    def __init__(self, rank: int, num_ranks: int, num_bytes: int) -> None:
        self._rank = rank
        self._owners = owners(num_layers_of(num_ranks), num_ranks, "interleaved")
        self._blocks = {
            peer: torch.ones(num_bytes, dtype=torch.uint8, device=f"cuda:{peer}")
            for peer in range(num_ranks)
            if peer != rank
        }
        self._slot = torch.empty(num_bytes, dtype=torch.uint8, device=f"cuda:{rank}")
        self._copies = torch.cuda.Stream(rank)

    def run(self, compute: Compute) -> float:
        """The compute never waits: what the wait would be is the planner's to say. The pass ends
        with its last copy only where that is later, so a pass without compute times the copies."""
        stream = torch.cuda.current_stream(self._rank)
        self._copies.wait_stream(stream)
        begin, computed, copied = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        begin.record(stream)
        for layer, owner in enumerate(self._owners):
            if owner != self._rank:
                with torch.cuda.stream(self._copies):
                    self._slot.copy_(self._blocks[owner], non_blocking=True)
            compute(layer)
        computed.record(stream)
        copied.record(self._copies)
        stream.wait_stream(self._copies)
        torch.cuda.synchronize(self._rank)
        return max(0.0, begin.elapsed_time(copied) - begin.elapsed_time(computed)) / 1e3

    def close(self) -> None:
        self._blocks.clear()


class CudaSentRows(SentRows):
    """Rows to the owner's memory, a GEMM there, results back; streams wait for one another by
    events, as flags in peer memory will have them do. The owner's own work is not disturbed."""

    def __init__(self, rank: int, num_ranks: int, decoder: Decoder, hidden_size: int) -> None:
        self._rank = rank
        self._decoder = decoder
        self._owners = owners(num_layers_of(num_ranks), num_ranks, "interleaved")
        self._streams = {p: torch.cuda.Stream(p) for p in range(num_ranks) if p != rank}

    def run(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        result = self._decoder.ffn(layer, rows)
        owner = self._owners[layer]
        if owner == self._rank:
            return result
        here, there = torch.cuda.current_stream(self._rank), self._streams[owner]
        there.wait_stream(here)
        with torch.cuda.stream(there):
            # A copy runs on the current stream of its source, and that of its target waits for it.
            answer = result.to(f"cuda:{owner}", non_blocking=True).add_(0)
            return answer.to(rows.device, non_blocking=True)

    def close(self) -> None:
        torch.cuda.synchronize(self._rank)

"""What TP rank 0 has decided of a decode step, on all TP ranks of its DP rank.

They have to run the same mode: a CUDA graph of one beside that of another would sum other buffers.
"""

from collections.abc import Mapping

import torch
from sglang.srt.runtime_context import get_parallel

Leases = Mapping[int, int] | None  # owner → first row; None: a WaS step


class SharedLeases:
    """One small message on the host per step, which TP rank 0 sends and the others receive.
    `num_ranks`: DP ranks."""

    def __init__(self, num_ranks: int) -> None:
        self._message = torch.empty(1 + num_ranks, dtype=torch.int64)  # is it CaS; rows by owner

    def send(self, leases: Leases) -> None:
        self._message.fill_(-1)
        self._message[0] = leases is not None
        for owner, first in (leases or {}).items():
            self._message[1 + owner] = first
        self._broadcast()

    def receive(self) -> Leases:
        self._broadcast()
        is_cas, *rows = self._message.tolist()
        return {owner: first for owner, first in enumerate(rows) if first >= 0} if is_cas else None

    def _broadcast(self) -> None:
        group = get_parallel().tp_group
        torch.distributed.broadcast(self._message, src=group.ranks[0], group=group.cpu_group)

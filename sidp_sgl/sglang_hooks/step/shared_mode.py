"""The mode of a decode step, which TP rank 0 has decided, on all TP ranks of its DP rank.

They have to run the same one: a CUDA graph of one mode beside that of another would sum other
buffers.
"""

import torch
from sglang.srt.runtime_context import get_parallel

from sidp_sgl.scheduler.modes.policy import CAS, WAS


class SharedMode:
    """One small message on the host per step, which TP rank 0 sends and the others receive."""

    def __init__(self) -> None:
        self._is_cas = torch.empty(1, dtype=torch.int64)

    def send(self, mode: str) -> None:
        self._is_cas[0] = mode == CAS
        self._broadcast()

    def receive(self) -> str:
        self._broadcast()
        return CAS if self._is_cas.item() else WAS

    def _broadcast(self) -> None:
        group = get_parallel().tp_group.cpu_group
        torch.distributed.broadcast(self._is_cas, group=group, group_src=0)

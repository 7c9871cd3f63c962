"""What each process of a DP rank has fetched, sent and served, for TP rank 0's status."""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel


class Members:
    """`figures()`: this process's."""

    def __init__(self, figures: Callable[[], dict[str, Any]]) -> None:
        self._figures = figures

    def gather(self) -> list[dict[str, Any]]:
        """By TP rank. All TP ranks call it at the same place."""
        parallel = get_parallel()
        gathered: list[Any] = [self._figures()] * parallel.tp_size
        if parallel.tp_size > 1:
            group = parallel.tp_group.cpu_group
            torch.distributed.all_gather_object(gathered, gathered[0], group=group)
        return gathered

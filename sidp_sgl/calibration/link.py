"""What lies between two ranks: fetches that run beside a pass through layers, and sent rows.

Room: calibration. One for CPU ranks (`shm_link.py`, over the engine's own transport), one for GPUs
(`cuda_link.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

Compute = Callable[[int], None]  # of one layer


def num_layers_of(num_ranks: int) -> int:
    """Layers of a measured pass: enough for slots to matter, as many for each rank."""
    return num_ranks * max(2, -(-8 // num_ranks))


class Fetches(ABC):
    """The fetches of one rank for blocks of one size; every rank owns as many layers."""

    @abstractmethod
    def run(self, compute: Compute) -> float:
        """One pass, each layer computed when its block is there; seconds waited for blocks."""

    @abstractmethod
    def close(self) -> None:
        """Once all ranks have ended their passes."""


class SentRows(ABC):
    """The FFNs of others' layers, computed by their owners."""

    @abstractmethod
    def run(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] → the same; computed here where the layer is this rank's."""

    @abstractmethod
    def close(self) -> None:
        """Once all ranks have ended their passes."""

"""A checksum of a stripe, computed where it lies: on a device without temporaries of its size.

Every 64-bit word counts with a weight of its position, an odd number, so that one changed byte
always changes the sum, and words that are torn, stale or out of place do but for a chance of 2⁻⁶³.
"""

import torch
import torch.nn.functional as F

_WORD = 8  # bytes
_WIDTH = 1024  # words of a row
_MIX = -7046029254386353131  # 2⁶⁴ over the golden ratio, odd: neighbours get unlike weights
_TAIL = 1 << 40  # the words of the last, shorter row count as rows from here on


def checksum(memory: torch.Tensor) -> torch.Tensor:
    """Of `memory` ([num_bytes] uint8): a scalar int64 on its device, to be had without waiting.

    A word in row r and column c counts (even number of c) + (odd number of r) times, so two plain
    sums over the memory are enough. All arithmetic wraps around.
    """
    words = _words(memory)
    whole = len(words) // _WIDTH * _WIDTH
    grid = words[:whole].view(-1, _WIDTH)
    columns = _weighted(grid.sum(0), 0) * 2
    rows, tail = _weighted(grid.sum(1), 0), _weighted(words[whole:], _TAIL)
    return columns + rows + tail


def _weighted(sums: torch.Tensor, first: int) -> torch.Tensor:
    """Their sum, each times an odd number of its own."""
    positions = torch.arange(first, first + len(sums), device=sums.device)
    return (sums * (positions * _MIX).bitwise_or(1)).sum()


def _words(memory: torch.Tensor) -> torch.Tensor:
    """[num_words] int64, the last one filled up with zeros."""
    missing = -memory.numel() % _WORD
    if missing or memory.storage_offset() % _WORD:
        memory = F.pad(memory, (0, missing))
    return memory.view(torch.int64)

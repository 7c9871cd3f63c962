"""Which process of an engine one is, and how it is called in what users read."""

from collections.abc import Iterator
from typing import Annotated, NamedTuple

from msgspec import Meta


class Member(NamedTuple):
    """One process of a DP rank. Members with the same `tp_rank` are a group: they pool weights."""

    dp_rank: Annotated[int, Meta(ge=0)]
    tp_rank: Annotated[int, Meta(ge=0)] = 0
    tp_size: Annotated[int, Meta(ge=1)] = 1  # of every DP rank

    def __str__(self) -> str:
        name = f"DP rank {self.dp_rank}"
        return name if self.tp_size == 1 else f"{name}, TP rank {self.tp_rank}"


def members(dp_size: int, tp_size: int) -> Iterator[Member]:
    """All of an engine."""
    for dp_rank in range(dp_size):
        for tp_rank in range(tp_size):
            yield Member(dp_rank, tp_rank, tp_size)

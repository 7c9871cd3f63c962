"""What a calibration measures, as plain values: they stand in its file, and the fit reads them.

Seconds are those of one rank while all ranks do the same.
"""

from dataclasses import dataclass
from typing import NamedTuple

from sidp_sgl.planner.models import ModelShape


def num_layers_of(num_ranks: int) -> int:
    """Layers of a measured pass: enough for slots to matter, as many for each rank."""
    return num_ranks * max(2, -(-8 // num_ranks))


class GemmPoint(NamedTuple):
    """[rows, in_width] times one weight, whose copies are used in turn as layers are."""

    rows: int
    in_width: int
    out_width: int
    seconds: float


class FetchPoint(NamedTuple):
    """One fetch of a block, with nothing computed meanwhile."""

    num_bytes: int
    seconds: float


class OverlapPoint(NamedTuple):
    """A pass through layers: alone, beside its fetches (without waits for them), and these."""

    alone: float
    beside: float
    fetches: float


class CallPoint(NamedTuple):
    """A pass through layers with `rows` rows: all computed here, and with the FFNs of others'
    layers sent to their owners."""

    rows: int
    local: float
    sent: float


class CollectivePoint(NamedTuple):
    """The sum of so many rows over all ranks, as if they were the TP ranks of one."""

    rows: int
    seconds: float


class StepPoint(NamedTuple):
    """A decode step of SGLang: a model of so many layers, `batch` requests of `context` tokens."""

    layers: int
    batch: int
    context: float
    seconds: float


@dataclass(frozen=True)
class RankPoints:
    """What one rank measures; SGLang's steps are measured apart.

    `copy_rate`: bytes per second between two ranks at full speed, all of them at once.
    """

    gemms: list[GemmPoint]
    fetches: list[FetchPoint]
    copy_rate: float
    overlaps: list[OverlapPoint]
    calls: list[CallPoint]
    collectives: list[CollectivePoint]


@dataclass(frozen=True)
class Measurements:
    """`shape`: the model whose layers were measured."""

    name: str
    shape: ModelShape
    num_ranks: int
    memory_bytes: int  # of a device, as SGLang finds it free
    ranks: RankPoints
    steps: list[StepPoint]

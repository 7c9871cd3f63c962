"""The interface of remote calls: rows of one rank that a unit's owner computes (CaS).

A rank has at most one call open at each owner. Rows lie in the owner's inbox (in rows that it has
leased to the requester), results in the requester's own memory: each side writes to the other's
memory and reads its own. Two implementations with the same tests: `shm` and `cuda`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum

import torch

from sidp_sgl.weightpool.cas.unit import PooledUnit


@dataclass(frozen=True)
class Call:
    """Rows for one unit, from the moment they lie in the owner's inbox until the answer."""

    requester: int
    number: int  # increases with every call of this requester to this owner
    unit: int  # which unit, as all ranks of the group number them
    offset: int  # bytes from the beginning of the inbox
    rows: int


class Outcome(Enum):
    """What became of a call."""

    DONE = 0
    FAILED = 1  # the owner could not compute it
    SILENT = 2  # no answer within the time given; it may still come


class Calls(ABC):
    """One rank's end: requester towards every owner, and owner towards every requester."""

    inbox: torch.Tensor  # [bytes] uint8: rows that others have sent here
    results: torch.Tensor  # [bytes] uint8: what owners have computed for this rank

    @abstractmethod
    def export(self) -> list[int]:
        """File descriptors that let peers call this rank and answer it."""

    @abstractmethod
    def connect(self, peer: int, file_descriptors: Sequence[int]) -> None:
        """Map what `peer` exported. Takes the descriptors over."""

    @abstractmethod
    def inbox_of(self, owner: int) -> torch.Tensor:
        """[bytes] uint8: `owner`'s inbox, to be written in leased rows only."""

    @abstractmethod
    def send(self, owner: int, unit: int, offset: int, rows: int) -> None:
        """Tell `owner` of rows that lie in its inbox."""

    @abstractmethod
    def wait(self, owner: int, seconds: float) -> Outcome:
        """Outcome of the latest call to `owner`, within so many seconds of its rows' arrival there;
        after SILENT it may be asked again."""

    def prepare(self, units: Sequence[PooledUnit]) -> Sequence[PooledUnit]:
        """`units` as this rank's service computes them."""
        return units

    def serving(self) -> AbstractContextManager[None]:
        """Around all that the thread does which receives, computes and answers."""
        return nullcontext()

    @abstractmethod
    def receive(self, seconds: float) -> list[Call]:
        """The calls that are there now; waits up to `seconds` for the first one."""

    @abstractmethod
    def wake(self) -> None:
        """Let a `receive` that waits return; from any thread."""

    @abstractmethod
    def results_of(self, requester: int) -> torch.Tensor:
        """[bytes] uint8: where `requester` expects its results."""

    @abstractmethod
    def answer(self, call: Call, outcome: Outcome) -> None:
        """Tell the requester that its results are there, or that there are none."""

    @abstractmethod
    def close(self) -> None:
        """Unmap and close. Idempotent."""

"""Calls between ranks: flags in memory that is mapped once, and an eventfd as doorbell at either
end, so that waiting costs no core.

A rank has at most one call open at each owner. Its payload lies in the owner's inbox (in rows that
it has leased), results in the requester's own memory: each side writes to the other's memory and
reads its own. The host writes what a call is and announces it; its number follows when the rows lie
in the inbox, at once on a CPU, in the order of the stream on a GPU. Answers are told in the same
way. All flags are aligned and 64 bits wide, so they are written at once.

Two implementations with the same tests: `transport/shm` and `transport/cuda`.
"""

import mmap
import os
import select
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum

import torch

from sidp_sgl.weightpool.cas.unit import PooledUnit
from sidp_sgl.weightpool.transport.interface import WAIT_SECONDS
from sidp_sgl.weightpool.transport.shm import memory as shm_memory

# Indices of a peer's flags: six that it writes as requester, three that it writes as owner.
NUMBER, UNIT, OFFSET, ROWS, RESULT, ANNOUNCED, ANSWERED, OUTCOME, ANSWERING = range(9)
FLAGS = 9
_SPIN_SECONDS, _LOOK_SECONDS = 1e-3, 50e-6  # then a core is left to others between two looks


@dataclass(frozen=True)
class Call:
    """Rows for one unit, from the moment they lie in the owner's inbox until the answer."""

    requester: int
    number: int  # increases with every call of this requester to this owner
    unit: int  # which unit, as all ranks of the group number them
    offset: int  # of the payload, in bytes from the beginning of the inbox
    rows: int
    result_offset: int  # in bytes from the beginning of the requester's results


class Outcome(Enum):
    """What became of a call."""

    DONE = 0
    FAILED = 1  # the owner could not compute it
    SILENT = 2  # no answer within the time given; it may still come


class SharedFlags:
    """One rank's flags and doorbells, mapped by itself and by its peers."""

    @staticmethod
    def create(num_ranks: int) -> list[int]:
        """File descriptors of a new rank's flags (whole pages) and doorbells."""
        num_bytes = -(-8 * FLAGS * num_ranks // mmap.PAGESIZE) * mmap.PAGESIZE
        options = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        flags = shm_memory.create("sidp-calls", num_bytes)
        return [flags, os.eventfd(0, options), os.eventfd(0, options)]

    def __init__(self, file_descriptors: Sequence[int]) -> None:
        flags, self.call_doorbell, self.answer_doorbell = file_descriptors
        self.file_descriptors = list(file_descriptors)
        self.map = mmap.mmap(flags, os.fstat(flags).st_size)
        self.values = memoryview(self.map).cast("q")

    def close(self) -> None:
        for fd in self.file_descriptors:
            os.close(fd)
        self.file_descriptors = []


class Mailbox(ABC):
    """One rank's end: requester towards every owner, and owner towards every requester.

    Subclasses know the memory, and how a flag is written after the rows.
    """

    inbox: torch.Tensor  # [bytes] uint8: rows that others have sent here
    results: torch.Tensor  # [bytes] uint8: what owners have computed for this rank

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank = rank
        self._own = SharedFlags(SharedFlags.create(num_ranks))
        self._peers: dict[int, SharedFlags] = {}
        self._results: dict[int, torch.Tensor] = {}
        self._inboxes: dict[int, torch.Tensor] = {}
        self._sent: dict[int, int] = {}  # owner → number of the latest call
        self._received: dict[int, int] = {}  # requester → number of the latest call
        self._call_poll, self._answer_poll = select.poll(), select.poll()
        self._call_poll.register(self._own.call_doorbell, select.POLLIN)
        self._answer_poll.register(self._own.answer_doorbell, select.POLLIN)

    @abstractmethod
    def export(self) -> list[int]:
        """File descriptors that let peers call this rank and answer it."""

    @abstractmethod
    def connect(self, peer: int, file_descriptors: Sequence[int]) -> None:
        """Map what `peer` exported. Takes the descriptors over."""

    @abstractmethod
    def _tell(self, peer: int, index: int, number: int) -> None:
        """Write `number` into flag `index` of `peer`, after the rows that were written before."""

    def _add_peer(
        self, peer: int, flags: Sequence[int], inbox: torch.Tensor, results: torch.Tensor
    ) -> None:
        self._peers[peer] = SharedFlags(flags)
        self._inboxes[peer], self._results[peer] = inbox, results
        self._sent[peer] = self._received[peer] = 0

    # As requester.

    def inbox_of(self, owner: int) -> torch.Tensor:
        """[bytes] uint8: `owner`'s inbox, to be written in leased rows only."""
        return self._inboxes[owner]

    def send(self, owner: int, unit: int, offset: int, rows: int, result_offset: int = 0) -> None:
        """Tell `owner` of a payload that lies in its inbox."""
        peer, first = self._peers[owner], FLAGS * self.rank
        self._sent[owner] += 1
        peer.values[first + UNIT] = unit
        peer.values[first + OFFSET] = offset
        peer.values[first + ROWS] = rows
        peer.values[first + RESULT] = result_offset
        peer.values[first + ANNOUNCED] = self._sent[owner]
        self._tell(owner, first + NUMBER, self._sent[owner])
        os.eventfd_write(peer.call_doorbell, 1)

    def wait(self, owner: int, seconds: float) -> Outcome:
        """Outcome of the latest call to `owner`, within so many seconds of its rows' arrival there;
        after SILENT it may be asked again."""
        flags, first, number = self._own.values, FLAGS * owner, self._sent[owner]
        begun = time.monotonic()
        deadline = begun + seconds
        is_late = False  # the rows had not left when patience ran out: then it begins anew
        while flags[first + ANSWERED] != number:
            now = time.monotonic()
            left = deadline - now
            if left <= 0:
                has_left = self._rows_have_left(owner, number)
                if seconds <= 0 or (has_left and not is_late) or now - begun > WAIT_SECONDS:
                    return Outcome.SILENT
                is_late, deadline = not has_left, now + seconds
                continue
            if flags[first + ANSWERING] == number:  # the owner's GPU is at it
                _pause(seconds - left)
            elif self._answer_poll.poll(left * 1e3):
                os.eventfd_read(self._own.answer_doorbell)
        return Outcome(flags[first + OUTCOME])

    def _rows_have_left(self, owner: int, number: int) -> bool:
        """Whether a call's rows lie in the owner's inbox. What this rank's own GPU had to do before
        is not the owner's silence, and after a silence no rows may arrive in a lease given back."""
        return self._peers[owner].values[FLAGS * self.rank + NUMBER] == number

    # As owner.

    def prepare(self, units: Sequence[PooledUnit]) -> Sequence[PooledUnit]:
        """`units` as this rank's service computes them."""
        return units

    def serving(self) -> AbstractContextManager[None]:
        """Around all that the thread does which receives, computes and answers."""
        return nullcontext()

    def receive(self, seconds: float) -> list[Call]:
        """The calls that are there now; waits up to `seconds` for the first one."""
        deadline, has_rung = time.monotonic() + seconds, False
        while not (calls := self._new_calls()):
            left = deadline - time.monotonic()
            if self._is_coming() and left > 0:
                _pause(seconds - left)
            elif has_rung or not self._call_poll.poll(max(left, 0.0) * 1e3):
                return []
            else:
                os.eventfd_read(self._own.call_doorbell)
                has_rung = True
        return calls

    def wake(self) -> None:
        """Let a `receive` that waits return; from any thread."""
        os.eventfd_write(self._own.call_doorbell, 1)

    def _is_coming(self) -> bool:
        """Whether a call was announced whose rows are still on their way."""
        flags = self._own.values
        return any(flags[FLAGS * r + ANNOUNCED] != flags[FLAGS * r + NUMBER] for r in self._peers)

    def _new_calls(self) -> list[Call]:
        flags, calls = self._own.values, []
        for requester, latest in self._received.items():
            first = FLAGS * requester
            number = flags[first + NUMBER]
            if number != latest:
                self._received[requester] = number
                calls.append(Call(requester, number, *flags[first + UNIT : first + RESULT + 1]))
        return calls

    def results_of(self, requester: int) -> torch.Tensor:
        """[bytes] uint8: where `requester` expects its results."""
        return self._results[requester]

    def answer(self, call: Call, outcome: Outcome) -> None:
        """Tell the requester that its results are there, or that there are none."""
        peer, first = self._peers[call.requester], FLAGS * self.rank
        peer.values[first + OUTCOME] = outcome.value
        peer.values[first + ANSWERING] = call.number
        self._tell(call.requester, first + ANSWERED, call.number)
        os.eventfd_write(peer.answer_doorbell, 1)

    def close(self) -> None:
        """Unmap and close. Idempotent."""
        for flags in [self._own, *self._peers.values()]:
            flags.close()


def _pause(waited: float) -> None:
    """Between two looks at a flag that a GPU is about to write; `waited`: seconds so far."""
    time.sleep(0 if waited < _SPIN_SECONDS else _LOOK_SECONDS)

"""Remote calls by words in memory that is mapped once, with an eventfd as doorbell at either end,
so that waiting costs no core. What both transports have in common.

The host writes what a call is and announces it; its number follows when the rows lie in the owner's
inbox, at once on a CPU, in the order of the stream on a GPU. Answers are told in the same way. All
words are aligned and 64 bits wide, so they are written at once.
"""

import mmap
import os
import select
import time
from abc import abstractmethod
from collections.abc import Sequence

import torch

from sidp_sgl.weightpool.cas.calls import Call, Calls, Outcome
from sidp_sgl.weightpool.transport.interface import WAIT_SECONDS
from sidp_sgl.weightpool.transport.shm import memory as shm_memory

NUMBER, UNIT, OFFSET, ROWS, ANNOUNCED, ANSWERED, OUTCOME, ANSWERING = range(8)
_SPIN_SECONDS, _LOOK_SECONDS = 1e-3, 50e-6  # then a core is left to others between two looks
WORDS = 8  # per peer: five that it writes as requester, three that it writes as owner


class Bells:
    """One rank's words and doorbells, mapped by itself and by its peers."""

    @staticmethod
    def create(num_ranks: int) -> list[int]:
        """File descriptors of a new rank's words (whole pages) and bells."""
        num_bytes = -(-8 * WORDS * num_ranks // mmap.PAGESIZE) * mmap.PAGESIZE
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        words = shm_memory.create("sidp-calls", num_bytes)
        return [words, os.eventfd(0, flags), os.eventfd(0, flags)]

    def __init__(self, file_descriptors: Sequence[int]) -> None:
        words, self.call_bell, self.answer_bell = file_descriptors
        self.file_descriptors = list(file_descriptors)
        self.map = mmap.mmap(words, os.fstat(words).st_size)
        self.words = memoryview(self.map).cast("q")

    def close(self) -> None:
        for fd in self.file_descriptors:
            os.close(fd)
        self.file_descriptors = []


class WordCalls(Calls):
    """One rank's end; subclasses know the memory and how a number is told."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self._rank = rank
        self._own = Bells(Bells.create(num_ranks))
        self._bells: dict[int, Bells] = {}  # of peers
        self._results: dict[int, torch.Tensor] = {}
        self._inboxes: dict[int, torch.Tensor] = {}
        self._sent: dict[int, int] = {}  # owner → number of the latest call
        self._received: dict[int, int] = {}  # requester → number of the latest call
        self._call_poll, self._answer_poll = select.poll(), select.poll()
        self._call_poll.register(self._own.call_bell, select.POLLIN)
        self._answer_poll.register(self._own.answer_bell, select.POLLIN)

    @abstractmethod
    def _tell(self, peer: int, index: int, number: int) -> None:
        """Write `number` into word `index` of `peer`, after the rows that were written before."""

    def _add_peer(
        self, peer: int, bells: Sequence[int], inbox: torch.Tensor, results: torch.Tensor
    ) -> None:
        self._bells[peer] = Bells(bells)
        self._inboxes[peer], self._results[peer] = inbox, results
        self._sent[peer] = self._received[peer] = 0

    def inbox_of(self, owner: int) -> torch.Tensor:
        return self._inboxes[owner]

    def results_of(self, requester: int) -> torch.Tensor:
        return self._results[requester]

    def send(self, owner: int, unit: int, offset: int, rows: int) -> None:
        peer, first = self._bells[owner], WORDS * self._rank
        self._sent[owner] += 1
        peer.words[first + UNIT] = unit
        peer.words[first + OFFSET] = offset
        peer.words[first + ROWS] = rows
        peer.words[first + ANNOUNCED] = self._sent[owner]
        self._tell(owner, first + NUMBER, self._sent[owner])
        os.eventfd_write(peer.call_bell, 1)

    def wait(self, owner: int, seconds: float) -> Outcome:
        words, first, number = self._own.words, WORDS * owner, self._sent[owner]
        begun = time.monotonic()
        deadline = begun + seconds
        is_late = False  # the rows had not left when patience ran out: then it begins anew
        while words[first + ANSWERED] != number:
            now = time.monotonic()
            left = deadline - now
            if left <= 0:
                has_left = self._rows_have_left(owner, number)
                if seconds <= 0 or (has_left and not is_late) or now - begun > WAIT_SECONDS:
                    return Outcome.SILENT
                is_late, deadline = not has_left, now + seconds
                continue
            if words[first + ANSWERING] == number:  # the owner's GPU is at it
                _pause(seconds - left)
            elif self._answer_poll.poll(left * 1e3):
                os.eventfd_read(self._own.answer_bell)
        return Outcome(words[first + OUTCOME])

    def _rows_have_left(self, owner: int, number: int) -> bool:
        """Whether a call's rows lie in the owner's inbox. What this rank's own GPU had to do before
        is not the owner's silence, and after a silence no rows may arrive in a lease given back."""
        return self._bells[owner].words[WORDS * self._rank + NUMBER] == number

    def receive(self, seconds: float) -> list[Call]:
        deadline, is_rung = time.monotonic() + seconds, False
        while not (calls := self._new_calls()):
            left = deadline - time.monotonic()
            if self._is_coming() and left > 0:
                _pause(seconds - left)
            elif is_rung or not self._call_poll.poll(max(left, 0.0) * 1e3):
                return []
            else:
                os.eventfd_read(self._own.call_bell)
                is_rung = True
        return calls

    def wake(self) -> None:
        os.eventfd_write(self._own.call_bell, 1)

    def _is_coming(self) -> bool:
        """Whether a call was announced whose rows are still on their way."""
        words = self._own.words
        return any(words[WORDS * r + ANNOUNCED] != words[WORDS * r + NUMBER] for r in self._bells)

    def _new_calls(self) -> list[Call]:
        words, calls = self._own.words, []
        for requester, latest in self._received.items():
            first = WORDS * requester
            number = words[first + NUMBER]
            if number != latest:
                self._received[requester] = number
                unit, offset, rows = words[first + UNIT : first + ROWS + 1]
                calls.append(Call(requester, number, unit, offset, rows))
        return calls

    def answer(self, call: Call, outcome: Outcome) -> None:
        peer, first = self._bells[call.requester], WORDS * self._rank
        peer.words[first + OUTCOME] = outcome.value
        peer.words[first + ANSWERING] = call.number
        self._tell(call.requester, first + ANSWERED, call.number)
        os.eventfd_write(peer.answer_bell, 1)

    def close(self) -> None:
        for bells in [self._own, *self._bells.values()]:
            bells.close()


def _pause(waited: float) -> None:
    """Between two looks at a word that a GPU is about to write; `waited`: seconds so far."""
    time.sleep(0 if waited < _SPIN_SECONDS else _LOOK_SECONDS)

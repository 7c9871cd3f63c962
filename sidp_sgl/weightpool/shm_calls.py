"""Remote calls between CPU ranks: rows and descriptors in memory that is mapped once, and an
eventfd as doorbell at either end, so that waiting costs no core.

A descriptor's number is written after everything that it tells of, and the doorbell after the
number; both are aligned words, which are written at once.
"""

import mmap
import os
import select
import time
from collections.abc import Sequence

import torch

from sidp_sgl.weightpool import shm_memory
from sidp_sgl.weightpool.calls import Call, Calls, Outcome

_NUMBER, _UNIT, _OFFSET, _ROWS, _ANSWERED, _OUTCOME = range(6)
_WORDS = 6  # per peer: four that it writes as requester, two that it writes as owner


class _End:
    """One rank's memory and doorbells, mapped by itself and by its peers."""

    def __init__(self, file_descriptors: Sequence[int]) -> None:
        inbox, results, words, self.call_bell, self.answer_bell = file_descriptors
        self.file_descriptors = list(file_descriptors)
        self.inbox = shm_memory.map_tensor(inbox, writable=True)
        self.results = shm_memory.map_tensor(results, writable=True)
        self.words = memoryview(mmap.mmap(words, os.fstat(words).st_size)).cast("q")

    def close(self) -> None:
        for fd in self.file_descriptors:
            os.close(fd)
        self.file_descriptors = []


class ShmCalls(Calls):
    """One CPU rank's end. `inbox_bytes` for the rows of all others, `results_bytes` for its own."""

    def __init__(self, rank: int, num_ranks: int, inbox_bytes: int, results_bytes: int) -> None:
        self._rank = rank
        self._own = _End(
            [
                shm_memory.create("sidp-inbox", inbox_bytes),
                shm_memory.create("sidp-results", results_bytes),
                shm_memory.create("sidp-calls", 8 * _WORDS * num_ranks),
                os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
                os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
            ]
        )
        self.inbox, self.results = self._own.inbox[:inbox_bytes], self._own.results[:results_bytes]
        self._peers: dict[int, _End] = {}
        self._sent: dict[int, int] = {}  # owner → number of the latest call
        self._received: dict[int, int] = {}  # requester → number of the latest call
        self._call_poll, self._answer_poll = select.poll(), select.poll()
        self._call_poll.register(self._own.call_bell, select.POLLIN)
        self._answer_poll.register(self._own.answer_bell, select.POLLIN)

    def export(self) -> list[int]:
        return self._own.file_descriptors

    def connect(self, peer: int, file_descriptors: Sequence[int]) -> None:
        self._peers[peer] = _End(file_descriptors)
        self._sent[peer] = self._received[peer] = 0

    def inbox_of(self, owner: int) -> torch.Tensor:
        return self._peers[owner].inbox

    def send(self, owner: int, unit: int, offset: int, rows: int) -> None:
        peer, first = self._peers[owner], _WORDS * self._rank
        self._sent[owner] += 1
        peer.words[first + _UNIT] = unit
        peer.words[first + _OFFSET] = offset
        peer.words[first + _ROWS] = rows
        peer.words[first + _NUMBER] = self._sent[owner]
        os.eventfd_write(peer.call_bell, 1)

    def wait(self, owner: int, seconds: float) -> Outcome:
        words, first, number = self._own.words, _WORDS * owner, self._sent[owner]
        deadline = None
        while words[first + _ANSWERED] != number:
            if deadline is None:
                deadline = time.monotonic() + seconds
            left = deadline - time.monotonic()
            if left <= 0:
                return Outcome.SILENT
            if self._answer_poll.poll(left * 1e3):
                os.eventfd_read(self._own.answer_bell)
        return Outcome(words[first + _OUTCOME])

    def receive(self, seconds: float) -> list[Call]:
        calls = self._new_calls()
        if calls or not self._call_poll.poll(seconds * 1e3):
            return calls
        os.eventfd_read(self._own.call_bell)
        return self._new_calls()

    def wake(self) -> None:
        os.eventfd_write(self._own.call_bell, 1)

    def _new_calls(self) -> list[Call]:
        words, calls = self._own.words, []
        for requester, latest in self._received.items():
            first = _WORDS * requester
            number = words[first + _NUMBER]
            if number != latest:
                self._received[requester] = number
                unit, offset, rows = words[first + _UNIT : first + _ROWS + 1]
                calls.append(Call(requester, number, unit, offset, rows))
        return calls

    def results_of(self, requester: int) -> torch.Tensor:
        return self._peers[requester].results

    def answer(self, call: Call, outcome: Outcome) -> None:
        peer, first = self._peers[call.requester], _WORDS * self._rank
        peer.words[first + _OUTCOME] = outcome.value
        peer.words[first + _ANSWERED] = call.number
        os.eventfd_write(peer.answer_bell, 1)

    def close(self) -> None:
        for end in [self._own, *self._peers.values()]:
            end.close()

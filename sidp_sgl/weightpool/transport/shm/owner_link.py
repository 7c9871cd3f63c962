"""An owner's link in shared memory: the readers' turns on it (a ticket lock), and its pace.

Turns only make fetches faster. A reader that waits too long, because another one was stopped or
died with its turn, goes on without: no rank depends on another's progress.
"""

import time

from sidp_sgl.weightpool.transport.interface import WAIT_SECONDS
from sidp_sgl.weightpool.transport.shm.memory import SharedIntegers

_NEXT_TICKET, _NOW_SERVING, _ABANDONED, _LINK_FREE_AT = range(4)
NUM_INTEGERS = 4
PATIENCE_SECONDS = 1.0  # without anybody's turn ending; a fetch takes milliseconds
_POLL_SECONDS = 50e-6
_MAX_PIECES = 16  # of a paced fetch
_MIN_PIECE_SECONDS = 1e-3
_MAX_QUEUE = 60  # tickets that the bits of _ABANDONED can tell apart, and then some


class OwnerLink:
    """What a reader of `owner` holds. All shared state lies with the owner."""

    def __init__(self, owner: int, fd: int, link_bytes_per_second: float | None) -> None:
        self.owner = owner
        self.skipped_turns = 0  # fetches that went on without a turn
        self._shared = SharedIntegers(fd, NUM_INTEGERS)
        self._rate = link_bytes_per_second
        self._stuck_at = -1  # the ticket that was being served when patience ran out
        self._last_finish = 0  # monotonic ns; a reader that goes on at once keeps its place

    def take_turn(self, patience: float = PATIENCE_SECONDS) -> bool:
        """Wait until the owner serves this reader, first come, first served.

        False where no turn ended for `patience` seconds: go on without, and don't end it.
        """
        ticket = self._draw_ticket()
        if ticket is None:
            self.skipped_turns += 1
            return False
        served, deadline = -1, 0.0
        while (serving := self._shared[_NOW_SERVING]) != ticket:
            if serving != served:
                served, deadline = serving, time.monotonic() + patience
            if time.monotonic() > deadline:
                return self._abandon(ticket)
            time.sleep(_POLL_SECONDS)
        return True

    def end_turn(self) -> None:
        """Serve the next reader; tickets that were abandoned are passed over."""
        with self._shared.locked(WAIT_SECONDS) as locked:
            if locked:
                self._advance()

    def _draw_ticket(self) -> int | None:
        if self._shared[_NOW_SERVING] == self._stuck_at:
            return None  # still the same reader's turn: don't wait for it again
        with self._shared.locked(PATIENCE_SECONDS) as locked:
            ticket = self._shared[_NEXT_TICKET]
            if not locked or ticket - self._shared[_NOW_SERVING] >= _MAX_QUEUE:
                return None
            self._shared[_NEXT_TICKET] = ticket + 1
            return ticket

    def _abandon(self, ticket: int) -> bool:
        """Give the ticket back; True where its turn has come in the last moment."""
        with self._shared.locked(PATIENCE_SECONDS) as locked:
            if locked and self._shared[_NOW_SERVING] == ticket:
                return True
            self._stuck_at = self._shared[_NOW_SERVING]
            self.skipped_turns += 1
            if locked:
                self._shared[_ABANDONED] |= 1 << ticket % 62
        return False

    def _advance(self) -> None:
        serving = self._shared[_NOW_SERVING] + 1
        while self._shared[_ABANDONED] >> serving % 62 & 1:
            self._shared[_ABANDONED] &= ~(1 << serving % 62)
            serving += 1
        self._shared[_NOW_SERVING] = serving

    @property
    def paced(self) -> bool:
        return self._rate is not None

    def piece_bytes(self, num_bytes: int) -> int:
        """Size of the pieces in which a fetch of `num_bytes` books the link, so that readers
        alternate; pieces under a millisecond would take more CPU time than fairness is worth."""
        assert self._rate is not None
        return max(-(-num_bytes // _MAX_PIECES), int(self._rate * _MIN_PIECE_SECONDS), 1)

    def pace(self, num_bytes: int) -> None:
        """Book `num_bytes` on the owner's link behind what is booked, and wait for their end.

        Readers that book pieces in turn share the link evenly; the sum never exceeds its rate.
        """
        assert self._rate is not None
        duration = int(num_bytes / self._rate * 1e9)
        with self._shared.locked(PATIENCE_SECONDS) as locked:
            now = time.monotonic_ns()
            # Waking up late must not cost link time: go on from where the last piece ended,
            # unless that is so long ago that the link was idle in between.
            ready = self._last_finish if now - self._last_finish < duration + 2_000_000 else now
            finish = max(self._shared[_LINK_FREE_AT], ready) + duration
            if locked:
                self._shared[_LINK_FREE_AT] = finish
        self._last_finish = finish
        wait = (finish - time.monotonic_ns()) / 1e9
        if wait > 0:
            time.sleep(wait)

    def close(self) -> None:
        self._shared.close()

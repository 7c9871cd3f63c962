"""An owner's port in shared words: the readers' turns, and the paced link that they share."""

import time

from sidp_sgl.weightpool.shm_memory import SharedWords
from sidp_sgl.weightpool.transport import WAIT_SECONDS, TransportError

_NEXT_TICKET, _NOW_SERVING, _LINK_FREE_AT = range(3)
NUM_WORDS = 3
_POLL_SECONDS = 50e-6


class OwnerPort:
    """What a reader of `owner` holds. All state lies in the owner's shared words."""

    def __init__(self, owner: int, fd: int, link_bytes_per_second: float | None) -> None:
        self.owner = owner
        self._words = SharedWords(fd, NUM_WORDS)
        self._rate = link_bytes_per_second
        self._last_finish = 0  # monotonic ns; a reader that goes on at once keeps its place

    def take_turn(self, timeout: float = WAIT_SECONDS) -> None:
        """Wait until the owner serves this reader; first come, first served."""
        with self._words.locked():
            ticket = self._words[_NEXT_TICKET]
            self._words[_NEXT_TICKET] = ticket + 1
        deadline = time.monotonic() + timeout
        while self._words[_NOW_SERVING] != ticket:
            if time.monotonic() > deadline:
                raise TransportError(
                    f"waited {timeout:.0f} s for rank {self.owner} to serve ticket {ticket}; "
                    f"it is at {self._words[_NOW_SERVING]}: another reader hangs"
                )
            time.sleep(_POLL_SECONDS)

    def end_turn(self) -> None:
        with self._words.locked():
            self._words[_NOW_SERVING] += 1

    @property
    def paced(self) -> bool:
        return self._rate is not None

    def pace(self, num_bytes: int) -> None:
        """Book `num_bytes` on the owner's link behind what is booked, and wait for their end.

        Readers that book pieces in turn share the link evenly; the sum never exceeds its rate.
        """
        assert self._rate is not None
        duration = int(num_bytes / self._rate * 1e9)
        with self._words.locked():
            now = time.monotonic_ns()
            # Waking up late must not cost link time: go on from where the last piece ended,
            # unless that is so long ago that the link was idle in between.
            ready = self._last_finish if now - self._last_finish < duration + 2_000_000 else now
            finish = max(self._words[_LINK_FREE_AT], ready) + duration
            self._words[_LINK_FREE_AT] = finish
        self._last_finish = finish
        wait = (finish - time.monotonic_ns()) / 1e9
        if wait > 0:
            time.sleep(wait)

    def close(self) -> None:
        self._words.close()

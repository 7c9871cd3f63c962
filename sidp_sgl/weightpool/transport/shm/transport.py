"""Transport `shm`: ranks on CPUs, peer memory by memfd, a worker thread as copy stream.

The reference for the CUDA transport: same interface, same event semantics, real hazards.
"""

import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from sidp_sgl.weightpool.alignment import ALIGNMENT
from sidp_sgl.weightpool.transport.interface import (
    WAIT_SECONDS,
    ComputeStream,
    CopyStream,
    Event,
    PeerStripe,
    Transport,
    TransportError,
)
from sidp_sgl.weightpool.transport.shm import memory as shm_memory
from sidp_sgl.weightpool.transport.shm.owner_link import NUM_INTEGERS, OwnerLink


class ShmEvent(Event):
    """Counts marks: `recorded` by the host when it asks, `done` when the stream gets there."""

    def __init__(self) -> None:
        self.recorded = 0
        self.done = 0
        self._changed = threading.Condition()

    def is_reached(self) -> bool:
        return self.done >= self.recorded

    def mark_done(self, mark: int) -> None:
        with self._changed:
            self.done = max(self.done, mark)
            self._changed.notify_all()

    def wait_for(self, mark: int, is_failed: Callable[[], BaseException | None]) -> None:
        """Block until `mark` is done; raises the stream's failure instead, or TransportError."""
        if self.done >= mark:
            return
        deadline = time.monotonic() + WAIT_SECONDS
        with self._changed:
            while self.done < mark:
                failure = is_failed()
                if failure is not None:
                    raise TransportError(f"the copy stream failed: {failure}") from failure
                if time.monotonic() > deadline:
                    raise TransportError(f"an event was not reached within {WAIT_SECONDS:.0f} s")
                self._changed.wait(timeout=1.0)


class ShmComputeStream(ComputeStream):
    """The thread that runs the forward pass: what it is asked for is done when the call returns."""

    def __init__(self, copy_failure: Callable[[], BaseException | None]) -> None:
        self._copy_failure = copy_failure

    def record(self, event: Event) -> None:
        assert isinstance(event, ShmEvent)
        event.recorded += 1
        event.mark_done(event.recorded)

    def wait(self, event: Event) -> None:
        assert isinstance(event, ShmEvent)
        event.wait_for(event.recorded, self._copy_failure)


class ShmCopyStream(CopyStream):
    """A worker thread that executes what the host enqueues, in order."""

    def __init__(self, links: dict[int, OwnerLink]) -> None:
        self._links = links
        self._work: deque[Callable[[], None] | None] = deque()  # None ends the thread
        self._not_empty = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self._has_turn = False
        self._thread = threading.Thread(target=self._run, name="sidp-copy", daemon=True)
        self._thread.start()

    def _enqueue(self, work: Callable[[], None] | None) -> None:
        self._work.append(work)
        self._not_empty.release()

    def _run(self) -> None:
        while True:
            self._not_empty.acquire()
            work = self._work.popleft()
            if work is None:
                return
            try:
                work()
            except BaseException as failure:  # reported by whoever waits for this stream
                self.failure = failure
                return

    def record(self, event: Event) -> None:
        assert isinstance(event, ShmEvent)
        event.recorded += 1
        mark = event.recorded
        self._enqueue(lambda: event.mark_done(mark))

    def wait(self, event: Event) -> None:
        assert isinstance(event, ShmEvent)
        mark = event.recorded
        self._enqueue(lambda: event.wait_for(mark, lambda: None))

    def copy(self, target: torch.Tensor, source: PeerStripe) -> None:
        self._enqueue(lambda: self._copy(target, source))

    def _copy(self, target: torch.Tensor, source: PeerStripe) -> None:
        link = self._links.get(source.owner)  # none to this rank's own memory
        if link is None or not link.paced:
            target.copy_(source.data)
            return
        # In its turn a reader has the link to itself; without one, readers alternate.
        size = max(1, target.numel()) if self._has_turn else link.piece_bytes(target.numel())
        for start in range(0, target.numel(), size):
            piece = target[start : start + size]
            piece.copy_(source.data[start : start + size])
            link.pace(piece.numel())

    def take_turn(self, source: PeerStripe) -> None:
        if source.owner in self._links:
            self._enqueue(lambda: self._take_turn(self._links[source.owner]))

    def _take_turn(self, link: OwnerLink) -> None:
        self._has_turn = link.take_turn()

    def end_turn(self, source: PeerStripe) -> None:
        if source.owner in self._links:
            self._enqueue(lambda: self._end_turn(self._links[source.owner]))

    def _end_turn(self, link: OwnerLink) -> None:
        if self._has_turn:
            link.end_turn()
        self._has_turn = False

    def synchronize(self) -> None:
        event = ShmEvent()
        self.record(event)
        event.wait_for(event.recorded, lambda: self.failure)

    def close(self) -> None:
        """Let the fetches under way end: a turn that stays taken would block the other readers."""
        self._enqueue(None)
        self._thread.join(timeout=5.0)


class ShmTransport(Transport):
    """One CPU rank. `link_bytes_per_second` paces every owner's link, or None for full speed."""

    def __init__(self, link_bytes_per_second: float | None = None) -> None:
        self._rate = link_bytes_per_second
        self._links: dict[int, OwnerLink] = {}
        self._memory_fd = -1
        self._link_fd = shm_memory.create("sidp-link", 8 * NUM_INTEGERS)
        self.copy_stream: ShmCopyStream = ShmCopyStream(self._links)
        self.compute_stream = ShmComputeStream(lambda: self.copy_stream.failure)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        assert self._memory_fd < 0, "a transport allocates once"
        self._memory_fd = shm_memory.create("sidp-blocks", num_bytes)
        return shm_memory.map_tensor(self._memory_fd, writable=True)[:num_bytes]

    def empty(self, num_bytes: int) -> torch.Tensor:
        # torch aligns to 64 bytes; views must start where a block's tensors do.
        raw = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
        return raw[-raw.data_ptr() % ALIGNMENT :][:num_bytes]

    @property
    def page_bytes(self) -> int:
        return mmap.PAGESIZE

    def aliased(
        self, num_bytes: int, ranges: Sequence[Sequence[tuple[int, int]]]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return shm_memory.map_aliased(num_bytes, ranges)

    def export(self) -> list[int]:
        return [self._memory_fd, self._link_fd]

    def connect(self, owner: int, file_descriptors: Sequence[int]) -> torch.Tensor:
        memory_fd, link_fd = file_descriptors
        self._links[owner] = OwnerLink(owner, link_fd, self._rate)
        memory = shm_memory.map_tensor(memory_fd, writable=False)
        for fd in file_descriptors:
            os.close(fd)
        return memory

    def event(self) -> ShmEvent:
        return ShmEvent()

    def skipped_turns(self) -> int:
        return sum(link.skipped_turns for link in self._links.values())

    def close(self) -> None:
        self.copy_stream.close()
        for link in self._links.values():
            link.close()
        for fd in (self._memory_fd, self._link_fd):
            if fd >= 0:
                os.close(fd)
        self._memory_fd = self._link_fd = -1

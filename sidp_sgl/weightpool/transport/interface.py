"""The interface between the pool and the machine: memory that peers map, streams, events.

Two implementations with the same tests: `shm` (CPU) and `cuda`. Semantics are CUDA's: a
stream executes in order; `event.record(stream)` marks a point; `stream.wait(event)` makes later
work wait for the latest mark that was recorded before the call, and is a no-op before the first.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

WAIT_SECONDS = 120.0  # bound of every wait for another process or thread


class TransportError(RuntimeError):
    """A wait ran out or a peer's memory could not be used."""


class Event(ABC):
    """A point in a stream's work. Each transport has its own."""

    @abstractmethod
    def is_reached(self) -> bool:
        """Whether the stream has come to the latest mark; true before the first."""


class Stream(ABC):
    """In-order work of one rank. The copy stream runs beside the compute stream."""

    @abstractmethod
    def record(self, event: Event) -> None:
        """Mark this point of the stream."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Later work of this stream waits for the event's latest mark."""


class ComputeStream(Stream):
    """The stream of the forward pass."""

    def launch(self, work: Callable[[], object]) -> None:
        """Enqueue what `work` enqueues through PyTorch."""
        work()


@dataclass(frozen=True)
class PeerStripe:
    """A stripe of a block in its owner's memory: `data` [num_bytes] uint8, not to be written, which
    belongs at byte `offset` of the block. `checksum`: of its bytes, as the owner offered it."""

    owner: int
    data: torch.Tensor
    offset: int = 0
    checksum: int | None = None


class CopyStream(Stream):
    """The stream that fetches."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: PeerStripe) -> None:
        """Copy a stripe into `target` (uint8, 1-D, same length)."""

    @abstractmethod
    def take_turn(self, source: PeerStripe) -> None:
        """Later work waits until the source's owner serves this rank and no other: an owner
        serves one reader at a time, first come, first served. Never for long: turns only make
        fetches faster, and no rank depends on another's progress."""

    @abstractmethod
    def end_turn(self, source: PeerStripe) -> None:
        """The owner may serve the next reader."""

    def fetch(
        self, slot: torch.Tensor, stripes: Sequence[PeerStripe], *, takes_turns: bool
    ) -> None:
        """Copy a block's `stripes` to their places in `slot`, in turns at their owners."""
        for stripe in stripes:
            target = slot[stripe.offset : stripe.offset + stripe.data.numel()]
            if takes_turns:
                self.take_turn(stripe)
            self.copy(target, stripe)
            if takes_turns:
                self.end_turn(stripe)

    @abstractmethod
    def synchronize(self) -> None:
        """Block until all work is done; raises what went wrong in it."""


class Transport(ABC):
    """One rank's side. `allocate` once, `export` to the peers, `connect` to theirs."""

    compute_stream: ComputeStream
    copy_stream: CopyStream

    @abstractmethod
    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Exportable memory, [num_bytes] uint8, zeroed; at most one call per transport."""

    @abstractmethod
    def empty(self, num_bytes: int) -> torch.Tensor:
        """Private memory of this rank's device, [num_bytes] uint8, for slots."""

    @property
    def page_bytes(self) -> int | None:
        """Of what `aliased` cuts; None where it can't."""
        return None

    def aliased(
        self, num_bytes: int, ranges: Sequence[Sequence[tuple[int, int]]]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Private memory [num_bytes] uint8, zeroed, and for each of `ranges` a second address of
        parts of it: (offset, num_bytes) each, side by side, in whole pages. It is never given
        back."""
        raise NotImplementedError

    @abstractmethod
    def export(self) -> list[int]:
        """File descriptors that give peers access to this rank's memory and to its turns."""

    @abstractmethod
    def connect(self, owner: int, file_descriptors: Sequence[int]) -> torch.Tensor:
        """Map what `owner` exported; returns its memory, [num_bytes] uint8. Takes the fds over."""

    @abstractmethod
    def event(self) -> Event:
        """A new event."""

    @property
    def shared_bytes(self) -> int:
        """What was exported, of the device's memory and not by PyTorch's allocator."""
        return 0

    def is_capturing(self) -> bool:
        """Whether what is enqueued now becomes part of a CUDA graph."""
        return False

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` enqueues, to be launched on the compute stream: a CUDA graph, where there are
        any."""
        return work

    @abstractmethod
    def skipped_turns(self) -> int:
        """Fetches so far that went on without a turn."""

    def synchronize(self) -> None:  # noqa: B027 (nothing to do on CPUs)
        """Block until the compute is done; on CPUs it always is."""

    @abstractmethod
    def close(self) -> None:
        """Stop the streams and unmap. Idempotent."""

"""Faults of the data plane on purpose, planted in one rank's transport: each is one that events,
turns and layouts protect from, and that the self-check has to find."""

import time
from collections.abc import Callable

import torch

from sidp_sgl.weightpool.transport.interface import PeerStripe, Transport
from tests.support.transports import FakeCudaTransport

Copy = Callable[[torch.Tensor, PeerStripe], None]


class Plant:
    """Changes what `transport` does with blocks of `owner`, or of everybody; `only_captured`: in
    CUDA graphs only."""

    def __init__(
        self, transport: Transport, owner: int | None = None, *, only_captured: bool = False
    ) -> None:
        self._transport, self._owner = transport, owner
        self._only_captured = only_captured
        self._memories: dict[int, torch.Tensor] = {}

    def _hits(self, source: PeerStripe) -> bool:
        is_now = not self._only_captured or self._transport.is_capturing()
        return is_now and self._owner in (None, source.owner)

    def _copies(self, faulty: Callable[[Copy, torch.Tensor, PeerStripe], object]) -> None:
        stream = self._transport.copy_stream
        original = stream.copy

        def copy(target: torch.Tensor, source: PeerStripe) -> None:
            if self._hits(source):
                faulty(original, target, source)
            else:
                original(target, source)

        stream.copy = copy  # type: ignore[method-assign]

    def _enqueue(self, work: Callable[[], object]) -> None:
        """On the copy stream."""
        stream = self._transport.copy_stream
        if isinstance(self._transport, FakeCudaTransport):
            self._transport.fake.enqueue(stream.handle, work)  # type: ignore[attr-defined]
        else:
            stream._enqueue(work)  # type: ignore[attr-defined]

    def wrong_byte(self) -> None:
        def faulty(copy: Copy, target: torch.Tensor, source: PeerStripe) -> None:
            copy(target, source)
            last = target[-1:]
            self._enqueue(lambda: last.bitwise_xor_(1))

        self._copies(faulty)

    def stale_slot(self) -> None:
        """What was to be copied is not."""
        self._copies(lambda copy, target, source: None)

    def torn_copy(self) -> None:
        """The second half is not copied."""

        def faulty(copy: Copy, target: torch.Tensor, source: PeerStripe) -> None:
            half = len(target) // 2
            copy(target[:half], PeerStripe(source.owner, source.data[:half]))

        self._copies(faulty)

    def swapped_owner(self, other: int) -> None:
        """Before the transport is connected: `other`'s memory is read in place of the owner's."""
        connect = self._transport.connect

        def note(owner: int, file_descriptors: list[int]) -> torch.Tensor:
            self._memories[owner] = connect(owner, file_descriptors)
            return self._memories[owner]

        self._transport.connect = note  # type: ignore[assignment, method-assign]
        self._copies(
            lambda copy, target, source: copy(
                target, PeerStripe(other, self._memories[other][: len(target)])
            )
        )

    def no_wait_for_ready(self) -> None:
        """And copies take their time."""
        self._copies(lambda copy, target, source: (self._enqueue(_take_time), copy(target, source)))
        self._transport.compute_stream.wait = lambda event: None  # type: ignore[method-assign]

    def no_wait_for_released(self) -> None:
        """And the compute takes its time."""
        launch = self._transport.compute_stream.launch

        def slowly(work: Callable[[], object]) -> None:
            launch(_take_time)
            launch(work)

        self._transport.compute_stream.launch = slowly  # type: ignore[method-assign]
        self._transport.copy_stream.wait = lambda event: None  # type: ignore[method-assign]


def _take_time() -> None:
    time.sleep(0.02)

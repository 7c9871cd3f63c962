"""Transports that show what events protect from: an asynchronous compute stream, as on a GPU,
and copies that are late, torn, and out of order between slots.
"""

import random
import threading
import time
from collections.abc import Callable

import torch

from sidp_sgl.weightpool.transport.interface import ComputeStream, CopyStream, Event, PeerStripe
from sidp_sgl.weightpool.transport.shm.transport import ShmCopyStream, ShmTransport

Kernel = Callable[[], None]


class AsyncComputeStream(ComputeStream):
    """In-order work beside the host, which runs ahead: `launch` returns at once, work starts late.

    `ignore_waits` is the negative control: kernels then read slots that are not ready.
    """

    def __init__(self, dice: random.Random, ignore_waits: bool) -> None:
        self._worker = ShmCopyStream({})
        self._dice = dice
        self._ignore_waits = ignore_waits

    def launch(self, kernel: Kernel) -> None:
        seconds = self._dice.uniform(0.0, 0.003)
        self._worker._enqueue(lambda: time.sleep(seconds))
        self._worker._enqueue(kernel)

    def record(self, event: Event) -> None:
        self._worker.record(event)

    def wait(self, event: Event) -> None:
        if not self._ignore_waits:
            self._worker.wait(event)

    def synchronize(self) -> None:
        self._worker.synchronize()

    def close(self) -> None:
        self._worker.close()


class HazardousCopyStream(CopyStream):
    """Fetches that start late and come in two halves; with `reorder`, slots overtake each other.

    A fetch is one unit: wait, [turn], copy, record; units of one slot keep their order.
    `ignore_waits` is the negative control: fetches then overwrite slots that are in use.
    """

    def __init__(
        self, transport: ShmTransport, dice: random.Random, reorder: bool, ignore_waits: bool
    ) -> None:
        self._links = transport._links
        self._dice = dice
        self._reorder = reorder
        self._ignore_waits = ignore_waits
        self._streams: dict[object, ShmCopyStream] = {}
        self._one_fetch_at_a_time = threading.Lock()  # as to the link; what waits is not counted
        self._current: ShmCopyStream | None = None

    @property
    def failure(self) -> BaseException | None:
        return next((s.failure for s in self._streams.values() if s.failure), None)

    def wait(self, event: Event) -> None:
        """Begins a fetch: each slot has a `released` event of its own."""
        slot = event if self._reorder else None
        if slot not in self._streams:
            self._streams[slot] = ShmCopyStream(self._links)
        self._current = self._streams[slot]
        if not self._ignore_waits:
            self._current.wait(event)
        self._sleep(0.002)
        self._current._enqueue(self._one_fetch_at_a_time.acquire)

    def take_turn(self, source: PeerStripe) -> None:
        self._stream().take_turn(source)

    def copy(self, target: torch.Tensor, source: PeerStripe) -> None:
        half = target.numel() // 2
        self._stream().copy(target[:half], PeerStripe(source.owner, source.data[:half]))
        self._sleep(0.001)
        self._stream().copy(target[half:], PeerStripe(source.owner, source.data[half:]))

    def end_turn(self, source: PeerStripe) -> None:
        self._stream().end_turn(source)

    def record(self, event: Event) -> None:
        self._stream()._enqueue(self._one_fetch_at_a_time.release)
        self._stream().record(event)
        self._current = None

    def synchronize(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def _stream(self) -> ShmCopyStream:
        assert self._current is not None, "a fetch begins with a wait"
        return self._current

    def _sleep(self, most: float) -> None:
        seconds = self._dice.uniform(0.0, most)
        self._stream()._enqueue(lambda: time.sleep(seconds))


class HazardousTransport(ShmTransport):
    """`shm` with the streams above; `seed` decides every delay."""

    def __init__(
        self,
        seed: int,
        *,
        reorder: bool = False,
        ignore_ready: bool = False,
        ignore_released: bool = False,
    ) -> None:
        super().__init__()
        self.copy_stream.close()
        dice = random.Random(seed)
        copies = HazardousCopyStream(self, dice, reorder, ignore_released)
        self.copy_stream = copies  # type: ignore[assignment]
        self.compute_stream = AsyncComputeStream(dice, ignore_ready)  # type: ignore[assignment]

    def synchronize(self) -> None:
        self.compute_stream.synchronize()  # type: ignore[attr-defined]

    def close(self) -> None:
        self.compute_stream.close()  # type: ignore[attr-defined]
        super().close()

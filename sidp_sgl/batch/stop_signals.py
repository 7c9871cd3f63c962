"""Ctrl-C and SIGTERM, noticed between two steps of the job; a second one ends it at once.

The output is whole at any moment, so the second one loses nothing but what is running.
"""

import os
import signal
from types import FrameType
from typing import Any

from sidp_sgl.batch.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Use as a context in the main thread."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received = number

    def check(self) -> None:
        """Raises Interrupted."""
        if self._received is not None:
            raise Interrupted(self._received)

"""The DP controller's view of its ranks: a thread that keeps the latest state of each.

Room: scheduler.
"""

import threading

from sidp_sgl.scheduler import bus
from sidp_sgl.scheduler.messages import StateUpdate
from sidp_sgl.scheduler.state import GroupState

_POLL_SECONDS = 1.0


class StateReceiver:
    """`group` may be read by any thread."""

    def __init__(self, engine: str) -> None:
        self.group = GroupState()
        self._inbox = bus.Inbox(bus.controller_address(engine))
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="sidp-states", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped:
            message = self._inbox.receive(_POLL_SECONDS)
            if isinstance(message, StateUpdate):
                self.group.update(message.state)
        self._inbox.close()

    def close(self) -> None:
        self._stopped = True
        self._thread.join(2 * _POLL_SECONDS)

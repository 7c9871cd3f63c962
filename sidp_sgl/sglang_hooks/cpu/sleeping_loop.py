"""On CPU ranks: the DP controller waits for requests instead of spinning on a core of theirs."""

from typing import Any

import zmq
from sglang.srt.managers.io_struct import sock_recv

_POLL_MILLISECONDS = 1000


def sleeping_loop(original: Any, controller: Any) -> None:
    """`DataParallelController.event_loop`, asleep between requests."""
    poller = zmq.Poller()
    poller.register(controller.recv_from_tokenizer, zmq.POLLIN)
    while True:
        controller.soft_watchdog.feed()
        poller.poll(_POLL_MILLISECONDS)
        while True:
            try:
                request = sock_recv(controller.recv_from_tokenizer, flags=zmq.NOBLOCK)
            except zmq.ZMQError:
                break
            controller._request_dispatcher(request)

"""A rank's end of the dispatch: counts what the DP controller sends, gives back what waits.

Only requests that have not begun can move; they go back as they came.
"""

from typing import Any

import zmq
from sglang.srt.managers.io_struct import (
    BatchTokenizedEmbeddingReqInput,
    BatchTokenizedGenerateReqInput,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
    sock_send,
)
from sglang.srt.managers.utils import is_health_check_generate_req

from sidp_sgl.scheduler.bus import returns_address
from sidp_sgl.scheduler.dispatch.link import ControllerLink

_BATCHES = (BatchTokenizedGenerateReqInput, BatchTokenizedEmbeddingReqInput)
_REQUESTS = (TokenizedGenerateReqInput, TokenizedEmbeddingReqInput)


def requests_in(message: Any) -> list[Any]:
    """The requests that a message from the tokenizer carries; health checks are none."""
    if isinstance(message, _BATCHES):
        return list(message)
    if isinstance(message, _REQUESTS) and not is_health_check_generate_req(message):
        return [message]
    return []


class WaitingRequests:
    """In a rank's scheduler."""

    def __init__(self, rank: int, controller: ControllerLink, engine: str) -> None:
        self.received = 0  # what was given back is not counted
        self._rank = rank
        self._controller = controller
        self._originals: dict[str, Any] = {}  # of requests that may still wait, by request id
        self._returns: zmq.Socket = zmq.Context.instance().socket(zmq.PUSH)
        self._returns.set(zmq.LINGER, 0)
        self._returns.connect(returns_address(engine))

    def take(self, messages: list[Any], scheduler: Any) -> None:
        """`messages` have come from the DP controller, and lie in the scheduler's queue."""
        for message in messages:
            for request in requests_in(message):
                self.received += 1
                if request.routed_dp_rank is None:  # else the user wants this rank
                    self._originals[request.rid] = request
        if recalled := self._controller.recalled():
            self._give_back(scheduler, recalled)
        queue = scheduler.waiting_queue
        if len(self._originals) > 2 * len(queue) + 64:
            waiting = {request.rid for request in queue}
            self._originals = {k: v for k, v in self._originals.items() if k in waiting}

    def _give_back(self, scheduler: Any, wanted: int) -> None:
        """Up to `wanted` requests, the latest first."""
        queue = scheduler.waiting_queue
        for request in [r for r in reversed(queue) if self._can_move(r)][:wanted]:
            original = self._originals[request.rid]
            original.wrap_pickle_fields()
            try:
                # The rank goes in front: the controller has to know whose it was.
                self._returns.send(str(self._rank).encode(), zmq.SNDMORE | zmq.NOBLOCK)
            except zmq.Again:
                return
            sock_send(self._returns, original)
            del self._originals[request.rid]
            queue.remove(request)
            scheduler._release_aborted_request(request)
            self.received -= 1

    def _can_move(self, request: Any) -> bool:
        return (
            request.rid in self._originals
            and not request.output_ids
            and not request.retraction_count
            and request.session is None
            and request.beam_group is None
            and request.multimodal_inputs is None
        )

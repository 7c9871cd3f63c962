"""A rank's end of the dispatch: counts what the DP controller sends, gives back what waits.

Only requests that have not begun can move; they go back as they came. TP rank 0 picks them, and its
choice rides on SGLang's broadcast of requests, so that all TP ranks let go of the same ones in the
same iteration.
"""

from dataclasses import dataclass
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
from sglang.utils import TypeBasedDispatcher

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


@dataclass(frozen=True)
class GiveBack:
    """To all TP ranks of a DP rank, behind the requests that have come in the same iteration."""

    request_ids: list[str]


class WaitingRequests:
    """In a rank's scheduler. `controller`: None on TP ranks above 0."""

    def __init__(self, rank: int, controller: ControllerLink | None, engine: str) -> None:
        self.received = 0  # what was given back is not counted
        self._rank = rank
        self._controller = controller
        self._originals: dict[str, Any] = {}  # of requests that may still wait, by request id
        self._returns: zmq.Socket = zmq.Context.instance().socket(zmq.PUSH)
        self._returns.set(zmq.LINGER, 0)
        self._returns.set(zmq.SNDHWM, 0)  # never full: what all TP ranks let go of has to be sent
        if controller is not None:
            self._returns.connect(returns_address(engine))

    def handle_give_back(self, scheduler: Any) -> None:
        """Let SGLang's scheduler take a GiveBack as it takes a request."""
        scheduler._request_dispatcher += TypeBasedDispatcher(
            [(GiveBack, lambda message: self._give_back(scheduler, message.request_ids))]
        )

    def pick(self, local: list[Any], scheduler: Any) -> list[Any]:
        """TP rank 0: `local`, what this rank adds to the requests that have come, and with it what
        the DP controller wants back: the latest that wait."""
        wanted = self._controller.recalled() if self._controller is not None else 0
        if not wanted:
            return local
        movable = [r.rid for r in reversed(scheduler.waiting_queue) if self._can_move(r)]
        return [*local, GiveBack(movable[:wanted])]

    def count(self, messages: list[Any], scheduler: Any) -> None:
        """`messages` have come from the DP controller, and lie in the scheduler's queue."""
        for message in messages:
            for request in requests_in(message):
                self.received += 1
                if request.routed_dp_rank is None:  # else the user wants this rank
                    self._originals[request.rid] = request
        queue = scheduler.waiting_queue
        if len(self._originals) > 2 * len(queue) + 64:
            waiting = {request.rid for request in queue}
            self._originals = {k: v for k, v in self._originals.items() if k in waiting}

    def _give_back(self, scheduler: Any, request_ids: list[str]) -> None:
        """Those that still wait: one may have been aborted since it was picked."""
        waiting = {request.rid: request for request in scheduler.waiting_queue}
        for request in [waiting[rid] for rid in request_ids if rid in waiting]:
            original = self._originals.pop(request.rid)
            if self._controller is not None:
                original.wrap_pickle_fields()
                # The rank goes in front: the controller has to know whose it was.
                self._returns.send(str(self._rank).encode(), zmq.SNDMORE)
                sock_send(self._returns, original)
            scheduler.waiting_queue.remove(request)
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

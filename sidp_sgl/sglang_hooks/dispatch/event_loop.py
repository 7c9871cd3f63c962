"""The DP controller with `--load-balance-method sidp`: its event loop, and what it tells the ranks.

Requests wait here, not at the ranks; everything else passes through as always.
"""

import itertools
import time
from collections import OrderedDict
from typing import Any

import zmq
from sglang.srt.managers.io_struct import AbortReq, sock_recv, sock_send

from sidp_sgl.scheduler import bus
from sidp_sgl.scheduler.dispatch.policy import Dispatcher
from sidp_sgl.scheduler.dispatch.prompts import prompt_key
from sidp_sgl.scheduler.dispatch.window import Queued
from sidp_sgl.scheduler.messages import DispatchUpdate, RankState, Recall
from sidp_sgl.sglang_hooks.dispatch.waiting import requests_in

_POLL_MILLISECONDS = 1000
_UPDATE_SECONDS = 0.2
_REMEMBERED = 10_000  # latest aborts; latest requests that went to ranks


class DispatchLoop:
    """In the DP controller process. `num_ranks`: DP ranks; `is_job` as for `Dispatcher`."""

    def __init__(self, engine: str, num_ranks: int, is_job: bool) -> None:
        self.dispatcher = Dispatcher(num_ranks, is_job)
        self._states = bus.Inbox(bus.states_address(engine))
        self._ranks = bus.Outbox({n: bus.dispatch_address(engine, n) for n in range(num_ranks)})
        self._returns = bus.listen(bus.returns_address(engine))
        self._numbers = itertools.count()
        self._aborted: OrderedDict[str, tuple[AbortReq, int]] = OrderedDict()
        self._sent: OrderedDict[str, int] = OrderedDict()  # number, by request id
        self._updated_at = 0.0
        self._update = DispatchUpdate(0, 0, 0)

    def event_loop(self, original: Any, controller: Any) -> None:
        """Instead of `DataParallelController.event_loop`."""
        poller = zmq.Poller()
        for socket in (controller.recv_from_tokenizer, self._states.socket, self._returns):
            poller.register(socket, zmq.POLLIN)
        wait = _POLL_MILLISECONDS
        while True:
            controller.soft_watchdog.feed()
            poller.poll(wait)
            for message in _received(controller.recv_from_tokenizer):
                self._on_message(controller, message)
            for state in self._states.drain():
                if isinstance(state, RankState):
                    self.dispatcher.update(state)
            self._take_returns(controller)
            for rank, queued in self.dispatcher.assign():
                self._send(controller, rank, queued)
            for rank, count in self.dispatcher.recalls():
                self._ranks.send(rank, Recall(count))
            wait = _POLL_MILLISECONDS if self._publish() else int(_UPDATE_SECONDS * 1e3)

    def _on_message(self, controller: Any, message: Any) -> None:
        requests = requests_in(message)
        for request in requests:
            queued = self._queued(request)
            if request.routed_dp_rank is None:
                self.dispatcher.window.add(queued)
            else:
                # SGLang refuses a rank that is not there.
                controller.dispatching = controller.round_robin_scheduler
                controller.dispatching_with_trace(request, refresh_load_budget=False)
                self.dispatcher.send(request.routed_dp_rank, queued)
        if isinstance(message, AbortReq):
            self._send_aborted(controller, message)
        if not requests:
            controller.dispatching = controller.round_robin_scheduler
            controller._request_dispatcher(message)

    def _queued(self, request: Any) -> Queued:
        token_ids = request.input_ids if request.input_ids is not None else []
        limit = getattr(request.sampling_params, "max_new_tokens", None)
        return Queued(
            next(self._numbers), prompt_key(token_ids), len(token_ids), limit or 0, request
        )

    def _send_aborted(self, controller: Any, abort: AbortReq) -> None:
        """Requests in the window that are to be aborted go to a rank first: it answers for them
        as SGLang does."""
        window = self.dispatcher.window
        for queued in [q for q in window if _is_meant(abort, q.payload)]:
            window.remove(queued.number)
            rank = min(range(len(self.dispatcher.ranks)), key=self._load)
            self.dispatcher.send(rank, queued)
            self._send(controller, rank, queued)
        # SGLang takes the id as a prefix; requests that come later are not meant.
        _remember(self._aborted, abort.rid, (abort, next(self._numbers)))

    def _send(self, controller: Any, rank: int, queued: Queued) -> None:
        """Through SGLang's own bookkeeping of dispatch times."""
        _remember(self._sent, queued.payload.rid, queued.number)
        controller.dispatching = lambda chosen: sock_send(controller.workers[rank], chosen)
        controller.dispatching_with_trace(queued.payload, refresh_load_budget=False)

    def _load(self, rank: int) -> int:
        return self.dispatcher.ranks[rank].load

    def _take_returns(self, controller: Any) -> None:
        """What ranks give back; a request that was aborted on the way is aborted again."""
        while self._returns.poll(0):
            rank = int(self._returns.recv())
            request = sock_recv(self._returns)
            number = self._sent.pop(request.rid, None)
            self.dispatcher.take_back(rank, self._queued(request))
            if number is not None and any(
                number < aborted_at and _is_meant(abort, request)
                for abort, aborted_at in self._aborted.values()
            ):
                abort = AbortReq(rid=request.rid)
                self._send_aborted(controller, abort)
                controller._request_dispatcher(abort)

    def _publish(self) -> bool:
        """Tell the ranks what their status shows; False where that has to wait a little."""
        dispatcher = self.dispatcher
        update = DispatchUpdate(len(dispatcher.window), dispatcher.sent, dispatcher.moved)
        now = time.monotonic()
        if update == self._update:
            return True
        if now - self._updated_at < _UPDATE_SECONDS:
            return False
        self._update, self._updated_at = update, now
        self._ranks.send_to_all(update)
        return True


def _received(socket: zmq.Socket) -> Any:
    """All messages that are there."""
    while True:
        try:
            message = sock_recv(socket, flags=zmq.NOBLOCK)
        except zmq.Again:
            return
        yield message


def _remember(entries: OrderedDict[str, Any], name: str, entry: Any) -> None:
    """As the latest one; the oldest are forgotten."""
    entries[name] = entry
    entries.move_to_end(name)
    while len(entries) > _REMEMBERED:
        entries.popitem(last=False)


def _is_meant(abort: AbortReq, request: Any) -> bool:
    return bool(abort.abort_all) or request.rid.startswith(abort.rid)

"""The DP controller's hooks around the dispatch policy, with a controller and ranks of straw."""

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.utils import TypeBasedDispatcher

from sidp_sgl.scheduler import bus
from sidp_sgl.scheduler.messages import RankState
from sidp_sgl.sglang_hooks.dispatch import event_loop as hooks
from sidp_sgl.sglang_hooks.dispatch.event_loop import DispatchLoop
from sidp_sgl.sglang_hooks.dispatch.waiting import WaitingRequests


def request(name: str, rank: int | None = None) -> TokenizedGenerateReqInput:
    return TokenizedGenerateReqInput(
        rid=name,
        input_text=None,
        input_ids=array("q", [1, 2, 3]),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=SamplingParams(max_new_tokens=5),
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
        routed_dp_rank=rank,
    )


class Controller:
    """Notes what goes to which rank, in order."""

    def __init__(self) -> None:
        self.workers = [0, 1]
        self.log: list[tuple[Any, str]] = []
        self.dispatching: Any = None

    def dispatching_with_trace(self, req: Any, refresh_load_budget: bool = True) -> None:
        self.dispatching(req)

    def round_robin_scheduler(self, req: Any) -> None:
        self.log.append((req.routed_dp_rank, req.rid))

    def _request_dispatcher(self, message: Any) -> None:
        self.log.append(("all", type(message).__name__))


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    made = Controller()
    monkeypatch.setattr(hooks, "sock_send", lambda rank, req: made.log.append((rank, req.rid)))
    return made


@pytest.fixture
def dispatch(engine_name: str) -> DispatchLoop:
    return DispatchLoop(engine_name, 2, is_job=True)


def state(rank: int, headroom: int, received: int = 0) -> RankState:
    return RankState(rank, 0, 0, received, 8, 1000, headroom)


def assigned(dispatch: DispatchLoop, controller: Controller) -> list[tuple[Any, str]]:
    for rank, queued in dispatch.dispatcher.assign():
        dispatch._send(controller, rank, queued)
    return controller.log


def test_a_request_waits_until_a_rank_has_room(
    dispatch: DispatchLoop, controller: Controller
) -> None:
    for number in range(6):
        dispatch._on_message(controller, request(f"r{number}"))
    assert controller.log == []
    assert len(assigned(dispatch, controller)) == 4, "two for each rank that is not known yet"
    dispatch.dispatcher.update(state(1, 1000, received=2))
    assert {rank for rank, _ in assigned(dispatch, controller)[4:]} == {1}
    assert len(controller.log) == 6


def test_a_request_for_a_rank_goes_there_at_once(
    dispatch: DispatchLoop, controller: Controller
) -> None:
    for number in range(4):
        dispatch._on_message(controller, request(f"r{number}", rank=1))
    assert controller.log == [(1, f"r{number}") for number in range(4)]
    assert dispatch.dispatcher.ranks[1].outstanding == 4


def test_what_is_aborted_in_the_window_goes_to_a_rank_before_its_abort(
    dispatch: DispatchLoop, controller: Controller
) -> None:
    for name in ("stays", "goes"):
        dispatch._on_message(controller, request(name))
    dispatch._on_message(controller, AbortReq(rid="goes"))
    (_, name), last = controller.log
    assert name == "goes" and last == ("all", "AbortReq")
    assert [queued.payload.rid for queued in dispatch.dispatcher.window] == ["stays"]


def test_all_are_aborted(dispatch: DispatchLoop, controller: Controller) -> None:
    for number in range(3):
        dispatch._on_message(controller, request(f"r{number}"))
    dispatch._on_message(controller, AbortReq(rid="", abort_all=True))
    assert [name for _, name in controller.log] == ["r0", "r1", "r2", "AbortReq"]
    assert len(dispatch.dispatcher.window) == 0


def straw_scheduler(names: list[str]) -> Any:
    queue = [
        SimpleNamespace(
            rid=name,
            output_ids=[7] if name == "begun" else [],
            retraction_count=0,
            session=None,
            beam_group=None,
            multimodal_inputs=None,
        )
        for name in names
    ]
    released: list[Any] = []
    return SimpleNamespace(
        waiting_queue=queue,
        released=released,
        _release_aborted_request=released.append,
        _request_dispatcher=TypeBasedDispatcher([]),
    )


def iterate(scheduler: Any, ranks: list[WaitingRequests], come: list[Any], abort: str = "") -> None:
    """One iteration of the first of a DP rank's TP ranks; what comes lies in the queue already."""
    picked = ranks[0].pick([], scheduler)
    scheduler.waiting_queue = [each for each in scheduler.waiting_queue if each.rid != abort]
    queue = list(scheduler.waiting_queue)
    for rank in ranks:
        scheduler.waiting_queue = list(queue)
        rank.handle_give_back(scheduler)
        for message in picked:
            scheduler._request_dispatcher(message)
        scheduler._request_dispatcher = TypeBasedDispatcher([])
        rank.count(come, scheduler)


def waiting_requests(engine_name: str) -> tuple[WaitingRequests, list[int]]:
    """Of rank 1; the controller's recalls go into the list."""
    recalls: list[int] = []
    link = SimpleNamespace(recalled=lambda: recalls.pop() if recalls else 0)
    return WaitingRequests(1, link, engine_name), recalls  # type: ignore[arg-type]


def send(dispatch: DispatchLoop, controller: Controller, each: Any) -> None:
    """To rank 1."""
    queued = dispatch._queued(each)
    dispatch.dispatcher.send(1, queued)
    dispatch._send(controller, 1, queued)


def test_a_rank_gives_back_the_latest_that_have_not_begun(
    dispatch: DispatchLoop, controller: Controller, engine_name: str
) -> None:
    rank, recalls = waiting_requests(engine_name)
    names = ["first", "second", "wanted here", "third", "begun"]
    sent = [request(name, rank=1 if name == "wanted here" else None) for name in names]
    for each in sent:
        send(dispatch, controller, each)
    scheduler = straw_scheduler(names)
    iterate(scheduler, [rank], sent)
    assert rank.received == 5
    dispatch._on_message(controller, AbortReq(rid="second"))  # it reaches no one that has it
    recalls.append(2)
    iterate(scheduler, [rank], [])
    assert [each.rid for each in scheduler.waiting_queue] == ["first", "wanted here", "begun"]
    assert [each.rid for each in scheduler.released] == ["third", "second"]
    assert rank.received == 3 and not recalls

    controller.log.clear()
    while dispatch.dispatcher.moved < 2:
        assert dispatch._returns.poll(10_000, zmq.POLLIN)
        dispatch._take_returns(controller)
    window = [queued.payload.rid for queued in dispatch.dispatcher.window]
    assert window == ["third"], "what was aborted on its way went to a rank, to be answered there"
    assert [entry[1] for entry in controller.log] == ["second", "AbortReq"]


def test_tp_ranks_let_go_of_the_same_requests_and_the_first_sends_them(
    dispatch: DispatchLoop, controller: Controller, engine_name: str
) -> None:
    rank, recalls = waiting_requests(engine_name)
    follower = WaitingRequests(1, None, engine_name)
    names = ["first", "second", "third", "fourth"]
    sent = [request(name) for name in names]
    for each in sent:
        send(dispatch, controller, each)
    scheduler = straw_scheduler(names)
    iterate(scheduler, [rank, follower], sent)
    recalls.append(3)
    iterate(scheduler, [rank, follower], [], abort="third")  # after it was picked
    assert [each.rid for each in scheduler.waiting_queue] == ["first"], "of the last TP rank"
    assert [each.rid for each in scheduler.released] == ["fourth", "second"] * 2
    assert rank.received == follower.received == 2
    while dispatch.dispatcher.moved < 2:
        assert dispatch._returns.poll(10_000, zmq.POLLIN)
        dispatch._take_returns(controller)
    assert not dispatch._returns.poll(50, zmq.POLLIN), "once each"


def test_an_abort_means_nobody_who_comes_later(
    dispatch: DispatchLoop, controller: Controller, engine_name: str
) -> None:
    """SGLang takes the id of an abort as a prefix: what has come since begins alike."""
    dispatch._on_message(controller, AbortReq(rid="soak-9"))
    dispatch._on_message(controller, AbortReq(rid="", abort_all=True))
    rank, recalls = waiting_requests(engine_name)
    late = request("soak-90")
    send(dispatch, controller, late)
    iterate(straw_scheduler([]), [rank], [late])
    recalls.append(1)
    iterate(straw_scheduler(["soak-90"]), [rank], [])
    assert dispatch._returns.poll(2000, zmq.POLLIN)
    controller.log.clear()
    dispatch._take_returns(controller)
    assert [queued.payload.rid for queued in dispatch.dispatcher.window] == ["soak-90"]
    assert controller.log == []


def test_the_ranks_hear_what_was_dispatched(dispatch: DispatchLoop, engine_name: str) -> None:
    inbox = bus.Inbox(bus.dispatch_address(engine_name, 0))
    dispatch.dispatcher.window.add(dispatch._queued(request("waits")))
    assert dispatch._publish()
    update = inbox.receive(2.0)
    assert update is not None and (update.queued, update.sent, update.moved) == (1, 0, 0)  # type: ignore[union-attr]
    inbox.close()


def test_health_checks_pass_by(dispatch: DispatchLoop, controller: Controller) -> None:
    check = request(f"{HEALTH_CHECK_RID_PREFIX}-1")
    dispatch._on_message(controller, check)
    assert controller.log == [("all", "TokenizedGenerateReqInput")]

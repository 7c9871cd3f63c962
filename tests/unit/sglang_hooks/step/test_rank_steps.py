"""Every step of a scheduler, on stand-ins for SGLang's: its mode, its cost, its state."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidp_sgl.scheduler.messages import RankState
from sidp_sgl.scheduler.modes.policy import CAS, LOCAL, WAS, ModePolicy
from sidp_sgl.scheduler.modes.step_modes import StepModes
from sidp_sgl.scheduler.modes.times import StepTimes
from sidp_sgl.sglang_hooks.step import rank_steps, shared_mode
from sidp_sgl.sglang_hooks.step.rank_steps import FollowerSteps, RankSteps
from sidp_sgl.sglang_hooks.step.shared_mode import SharedMode
from tests.support.groups import in_ranks


class Times(StepTimes):
    """Remembers what it was told of."""

    def __init__(self) -> None:
        super().__init__(1.0, {1: 1.0})
        self.observed: list[tuple[str, int, float, float]] = []

    def observe(self, mode: str, batch_size: int, seconds: float, stall_seconds: float) -> None:
        self.observed.append((mode, batch_size, seconds, stall_seconds))


class Rank:
    """One rank's steps, and all that happens around them; `events` in the order they came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, has_requester: bool = True) -> None:
        self.now = 100.0
        self.events: list[Any] = []
        self.grants = True
        self.is_available = True
        self.counters = SimpleNamespace(stall_seconds=0.0)
        self.prefetcher = SimpleNamespace(counters=self.counters, residents=())
        self.pool = pool = SimpleNamespace(rank=1, prefetcher=self.prefetcher, is_local=False)
        self.modes = StepModes(ModePolicy("cas"), self, max_rows=64)  # type: ignore[arg-type]
        self.times = self.modes.times = Times()
        self.control = SimpleNamespace(
            modes=self.modes, own_batch_size=0, publish=lambda s: self.events.append(("publish", s))
        )
        self.requester = SimpleNamespace(
            is_available=lambda: self.is_available,
            begin_step=lambda rows: self.events.append(("begin", rows)),
            end_step=lambda: self.events.append("end"),
        )
        execution: Any = SimpleNamespace(requester=self.requester if has_requester else None)
        self.steps: Any = RankSteps(self.control, pool, execution)  # type: ignore[arg-type]
        self.received: list[Any] = []  # what TP rank 0 has shared, where this is another one
        self.follower: Any = FollowerSteps(pool, execution, self.received.pop)  # type: ignore[arg-type]
        self.scheduler = SimpleNamespace(
            _sched_idled=False,
            running_batch=SimpleNamespace(reqs=[]),
            last_batch=None,
            waiting_queue=[],
            max_running_requests=64,
            max_total_num_tokens=1600,
            pool_stats_observer=SimpleNamespace(
                get_pool_stats=lambda: SimpleNamespace(
                    full_available_size=700, full_evictable_size=100
                )
            ),
        )
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(rank_steps, "time", clock)

    # As the modes see the lease client.

    def acquire(self, rows: int, seconds: float) -> bool:
        self.events.append(("leases", rows))
        return self.grants

    def ask(self, rows: int) -> None:
        self.events.append(("ask", rows))

    def release(self) -> None:
        self.events.append("release")

    # As SGLang's event loop goes.

    def step(
        self, batch_size: int, *, is_decode: bool = True, seconds: float = 1.0, stall: float = 0.0
    ) -> Any:
        """A forward pass of so many seconds, `stall` of them waiting for fetches."""

        def forward(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            assert scheduler is self.scheduler
            self.events.append("forward")
            self.now += seconds
            self.counters.stall_seconds += stall
            return batch, args, kwargs

        self.batch = SimpleNamespace(
            forward_mode=SimpleNamespace(
                is_decode=lambda: is_decode, is_extend=lambda: not is_decode
            ),
            batch_size=lambda: batch_size,
            extend_num_tokens=batch_size,
        )
        result = self.steps.run_batch(forward, self.scheduler, self.batch, "proxy", last=2)
        self.scheduler._sched_idled = False
        return result

    def idle(self, seconds: float) -> None:
        self.now += seconds
        self.scheduler._sched_idled = True


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    return Rank(monkeypatch)


def test_a_prefill_that_is_too_long_streams_weights_and_asks_nobody(rank: Rank) -> None:
    rank.step(65, is_decode=False)
    assert rank.events == ["forward"]
    assert rank.modes.steps == {WAS: 1, CAS: 0, LOCAL: 0}


def test_a_local_step_asks_nobody_and_teaches_nothing(rank: Rank) -> None:
    rank.pool.is_local, rank.prefetcher.residents = True, (3, 5)
    rank.step(8)
    rank.step(8)
    assert rank.events == ["forward", "release"] * 2
    assert rank.modes.steps == {WAS: 0, CAS: 0, LOCAL: 2}
    rank.pool.is_local = False
    rank.step(8)
    rank.step(8)
    assert rank.modes.steps == {WAS: 0, CAS: 2, LOCAL: 2}
    assert rank.times.observed == [], "some blocks are here still"


def test_a_short_prefill_sends_its_rows_and_its_leases_end_with_it(rank: Rank) -> None:
    rank.step(64, is_decode=False)
    assert rank.events == [("leases", 64), ("begin", 64), "forward", "end", "release"]
    assert rank.modes.steps == {WAS: 0, CAS: 1, LOCAL: 0}
    assert rank.times.observed == []


def test_a_prefill_without_leases_streams_weights(rank: Rank) -> None:
    rank.grants = False
    rank.step(4, is_decode=False)
    assert rank.events == [("leases", 4), "forward"]
    assert rank.modes.steps == {WAS: 1, CAS: 0, LOCAL: 0}


def test_a_decode_step_with_leases_sends_its_rows(rank: Rank) -> None:
    assert rank.step(4) == (rank.batch, ("proxy",), {"last": 2})
    assert rank.events == [("leases", 4), ("begin", 4), "forward", "end", ("ask", 8)]
    assert rank.modes.steps == {WAS: 0, CAS: 1, LOCAL: 0}


def test_a_decode_step_without_leases_streams_weights(rank: Rank) -> None:
    rank.grants = False
    assert rank.step(4) == (rank.batch, ("proxy",), {"last": 2})
    assert rank.events == [("leases", 4), "forward", ("ask", 8)]
    assert rank.modes.steps == {WAS: 1, CAS: 0, LOCAL: 0}


def test_nobody_is_asked_while_an_answer_is_missing(rank: Rank) -> None:
    rank.is_available = False
    rank.step(4)
    assert ("leases", 4) not in rank.events
    assert rank.modes.steps == {WAS: 1, CAS: 0, LOCAL: 0}
    rank.is_available = True
    rank.step(4)
    assert rank.modes.steps == {WAS: 1, CAS: 1, LOCAL: 0}


def test_without_calls_every_step_streams_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch, has_requester=False)
    rank.step(4)
    assert ("leases", 4) not in rank.events
    assert rank.modes.steps == {WAS: 1, CAS: 0, LOCAL: 0}


def test_a_step_that_raises_ends_its_calls(rank: Rank) -> None:
    def forward(*_: Any, **__: Any) -> None:
        rank.events.append("forward")
        raise RuntimeError("out of memory")

    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: True), batch_size=lambda: 4
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        rank.steps.run_batch(forward, rank.scheduler, batch)
    assert rank.events == [("leases", 4), ("begin", 4), "forward", "end"]


def test_a_decode_step_lasts_until_the_next_one_begins(rank: Rank) -> None:
    rank.counters.stall_seconds = 5.0
    rank.step(4, seconds=0.5, stall=0.25)
    rank.now += 0.125  # the scheduler's own part
    assert rank.times.observed == []
    rank.grants = False
    rank.step(6, seconds=2.0)
    assert rank.times.observed == [(CAS, 4, 0.625, 0.25)]
    rank.step(6)
    assert rank.times.observed[1:] == [(WAS, 6, 2.0, 0.0)]


def test_a_step_after_which_the_rank_was_idle_is_not_observed(rank: Rank) -> None:
    rank.step(4)
    rank.idle(60.0)
    rank.step(5)
    assert rank.times.observed == []
    rank.step(5)
    assert rank.times.observed == [(CAS, 5, 1.0, 0.0)]


def test_a_step_that_a_prefill_follows_is_not_observed(rank: Rank) -> None:
    rank.step(4)
    rank.step(100, is_decode=False)
    rank.step(5)
    assert rank.times.observed == []


def test_steps_go_on_where_nothing_was_measured(rank: Rank) -> None:
    rank.modes.times = None
    rank.step(4)
    rank.step(4)
    assert rank.modes.steps == {WAS: 0, CAS: 2, LOCAL: 0}


def test_the_state_is_published_with_the_schedulers_figures(rank: Rank) -> None:
    rank.scheduler.running_batch.reqs = [object()] * 3
    rank.scheduler.waiting_queue = [object()] * 2
    rank.steps.publish(rank.scheduler)
    assert rank.events == [("publish", RankState(1, 3, 2, 0, 64, 1600, 800))]
    assert rank.control.own_batch_size == 3


def test_leases_are_given_back_when_nothing_runs_any_more(rank: Rank) -> None:
    rank.scheduler.running_batch.reqs = [object()]
    rank.steps.publish(rank.scheduler)
    assert "release" not in rank.events
    rank.scheduler.running_batch.reqs = []
    rank.steps.publish(rank.scheduler)
    assert "release" in rank.events
    assert rank.control.own_batch_size == 0


@pytest.mark.parametrize("has_requester", [True, False])
def test_step_times_are_measured_where_rows_can_be_sent(
    has_requester: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(monkeypatch, has_requester=has_requester)
    rank.modes.times = None
    measured = Times()
    monkeypatch.setattr(rank_steps, "calibrate", lambda *_: measured)
    rank.steps.calibrate(rank.scheduler)
    assert rank.modes.times is (measured if has_requester else None)


# With TP: rank 0 decides, the others follow.


def test_tp_rank_0_shares_every_step_that_may_be_cas(rank: Rank) -> None:
    shared: list[Any] = []
    rank.steps.share = shared.append
    rank.step(4)
    rank.step(100, is_decode=False)
    rank.grants = False
    rank.step(4)
    assert shared == [CAS, WAS, WAS]
    assert rank.events.index("forward") > 0, "before the forward pass, or it would wait there"


def test_nothing_is_shared_where_every_step_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch, has_requester=False)
    shared: list[Any] = []
    rank.steps.share = shared.append
    rank.step(4)
    assert shared == []
    rank.steps = rank.follower  # which waits for nothing
    assert rank.step(4) == (rank.batch, ("proxy",), {"last": 2})
    assert rank.events[-1] == "forward"


def test_a_follower_does_what_was_decided(rank: Rank) -> None:
    rank.steps = rank.follower
    rank.received += [WAS, WAS, CAS]
    rank.is_available = False  # not asked: the requester computes by itself, in the same mode
    assert rank.step(4) == (rank.batch, ("proxy",), {"last": 2})
    rank.step(100, is_decode=False)
    rank.step(5)
    assert rank.events == [("begin", 4), "forward", "end", "forward", "forward"]
    assert not rank.received
    rank.steps.publish(rank.scheduler)
    assert rank.modes.steps == {WAS: 0, CAS: 0, LOCAL: 0}, "it counts nothing"


@pytest.mark.parametrize("has_requester", [True, False])
def test_a_follower_runs_the_same_dummy_steps(
    has_requester: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(monkeypatch, has_requester=has_requester)
    asked: list[Any] = []
    monkeypatch.setattr(rank_steps, "calibrate", lambda *given: asked.append(given[0]))
    rank.follower.calibrate(rank.scheduler)
    rank.steps.calibrate(rank.scheduler)
    assert asked == ([rank.scheduler] * 2 if has_requester else [])


def test_what_tp_rank_0_shares_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    here, modes = threading.local(), [CAS, WAS, CAS]
    monkeypatch.setattr(shared_mode, "get_parallel", lambda: here.parallel)

    def rank(group: torch.distributed.ProcessGroup) -> list[str]:
        here.parallel = SimpleNamespace(tp_group=SimpleNamespace(cpu_group=group))
        shared = SharedMode()
        if group.rank() > 0:
            return [shared.receive() for _ in modes]
        for mode in modes:
            shared.send(mode)
        return modes

    assert in_ranks(3, rank) == [modes] * 3

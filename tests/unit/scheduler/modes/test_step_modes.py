"""The mode of every step: what the policy wants, what the owners grant, and what is sent for it."""

from collections.abc import Iterator

import pytest

from sidp_sgl.scheduler.modes import lease_server, step_modes
from sidp_sgl.scheduler.modes.policy import CAS, DWELL_STEPS, LOCAL, WAS, ModePolicy
from sidp_sgl.scheduler.modes.step_modes import StepModes
from sidp_sgl.scheduler.modes.times import StepTimes
from tests.support.control import AMPLE_SECONDS, Rank, ranks_in, wait_until

MAX_ROWS = 64


@pytest.fixture(autouse=True)
def answers_always_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_modes, "_PATIENCE_SECONDS", (AMPLE_SECONDS, AMPLE_SECONDS))
    monkeypatch.setattr(lease_server, "_POLL_SECONDS", 0.01)


@pytest.fixture
def ranks(engine_name: str) -> Iterator[list[Rank]]:
    """Rank 0 asks rank 1."""
    with ranks_in(engine_name, 2) as both:
        yield both


def step_modes_of(rank: Rank, mode: str, threshold: int | None = None) -> StepModes:
    return StepModes(ModePolicy(mode), rank.client, threshold, MAX_ROWS)


def decode(modes: StepModes, batch_size: int, *, can_call: bool = True) -> str:
    """One decode step; the mode that it ran in."""
    mode = modes.begin_decode(batch_size, can_call=can_call)
    modes.end_decode(batch_size, mode)
    return mode


def test_was_never_sends_a_message(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "was")
    for batch_size in (1, 8, 64, 500):
        assert decode(modes, batch_size) == WAS
        modes.end_prefill("was")
    assert ranks[0].sent == []
    assert modes.steps == {WAS: 8, CAS: 0, LOCAL: 0}


def test_cas_is_used_as_long_as_owners_grant(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "cas")
    for batch_size in (1, 7, 30, MAX_ROWS, 2):
        assert decode(modes, batch_size) == CAS
    assert modes.steps == {WAS: 0, CAS: 5, LOCAL: 0}
    assert ranks[0].client.negotiation.declined == 0


def test_more_rows_than_may_be_asked_for_stream_weights(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "cas")
    assert decode(modes, MAX_ROWS + 1) == WAS
    assert ranks[0].sent == []
    assert decode(modes, MAX_ROWS) == CAS
    assert decode(modes, MAX_ROWS + 1) == WAS
    assert modes.leases.negotiation.rows == 0, "nothing is leased for nothing"
    assert decode(modes, MAX_ROWS) == CAS


def test_without_calls_the_step_streams_weights(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "cas")
    assert decode(modes, 4, can_call=False) == WAS
    assert modes.policy.mode == CAS
    assert decode(modes, 4) == CAS


def test_a_prefill_is_sent_below_the_threshold_whatever_decode_steps_do(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "auto", threshold=20)
    assert decode(modes, 30) == WAS
    for num_tokens, mode in ((17, CAS), (20, WAS), (500, WAS), (3, CAS)):
        assert modes.begin_prefill(num_tokens, can_call=True) == mode
        modes.end_prefill(mode)
        assert modes.policy.mode == WAS and modes.leases.negotiation.rows == 0
    assert modes.begin_prefill(3, can_call=False) == WAS
    assert modes.steps == {WAS: 3, CAS: 2, LOCAL: 0} and modes.policy.switches == 0
    assert step_modes_of(ranks[1], "cas").begin_prefill(MAX_ROWS, can_call=True) == CAS
    assert step_modes_of(ranks[1], "cas").begin_prefill(MAX_ROWS + 1, can_call=True) == WAS


def test_prefills_alone_know_their_threshold(ranks: list[Rank]) -> None:
    """A job that only scores prompts has no decode step."""
    for fetch_seconds, mode in ((10.0, CAS), (1e-6, WAS)):
        modes = step_modes_of(ranks[0], "auto")
        modes.times = StepTimes(fetch_seconds, {1: 1e-3, MAX_ROWS: 2e-3})
        assert modes.begin_prefill(MAX_ROWS, can_call=True) == mode
        modes.end_prefill(mode)


def test_a_local_step_asks_nobody(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "auto", threshold=20)
    assert decode(modes, 4) == CAS
    sent = len(ranks[0].sent)
    for _ in range(3):
        assert modes.begin_decode(4, can_call=True, is_local=True) == LOCAL == modes.mode
        modes.end_decode(4, LOCAL)
        assert modes.begin_prefill(4, can_call=True, is_local=True) == LOCAL
        modes.end_prefill(LOCAL)
        assert modes.leases.negotiation.rows == 0
    assert len(ranks[0].sent) <= sent + 1, "what was asked ahead is given back"
    assert modes.steps == {WAS: 0, CAS: 1, LOCAL: 6}
    assert decode(modes, 4) == CAS == modes.mode


def test_after_a_decline_the_step_streams_weights_and_the_next_one_asks_again(
    ranks: list[Rank],
) -> None:
    modes = step_modes_of(ranks[0], "cas")
    ranks[1].refusal = "busy"
    assert decode(modes, 4) == WAS
    assert decode(modes, 4) == WAS
    assert ranks[1].server.declines["busy"] >= 2
    wait_until(lambda: ranks[1].server.declines["busy"] == 3)  # the one that was asked ahead
    ranks[1].refusal = None
    assert decode(modes, 4) == WAS, "the answer is here already"
    assert decode(modes, 4) == CAS
    assert ranks[0].client.negotiation.requests == len(ranks[0].requests) == 5


def test_what_was_asked_ahead_is_used_by_the_next_step(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "cas")
    assert modes.begin_decode(3, can_call=True) == CAS
    assert [request.rows for _, request in ranks[0].requests] == [3]
    modes.end_decode(3, CAS)
    assert [request.rows for _, request in ranks[0].requests] == [3, 8], "room to grow a little"
    for batch_size in (8, 5):
        assert modes.begin_decode(batch_size, can_call=True) == CAS
        assert len(ranks[0].requests) == 2
    modes.end_prefill("was")
    assert modes.begin_decode(8, can_call=True) == CAS, "a prefill between changes nothing"
    assert len(ranks[0].requests) == 2
    assert modes.begin_decode(9, can_call=True) == CAS
    assert [request.rows for _, request in ranks[0].requests] == [3, 8, 9], "a larger batch"
    modes.end_decode(MAX_ROWS - 1, CAS)
    assert ranks[0].requests[-1][1].rows == MAX_ROWS, "never more than may be asked for"


def test_a_given_threshold_is_used_whatever_was_measured(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "auto", threshold=8)
    modes.times = StepTimes(1.0, {1: 1e-3, 64: 2e-3})  # by which no batch would stream
    assert [decode(modes, 7) for _ in range(3)] == [CAS] * 3
    assert [decode(modes, 8) for _ in range(DWELL_STEPS)] == [CAS] * (DWELL_STEPS - 1) + [WAS]
    assert modes.threshold == 8
    assert modes.policy.switches == 1


def test_a_switch_forgets_what_was_asked_ahead(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "auto", threshold=8)
    for batch_size in [4, *[20] * DWELL_STEPS]:
        decode(modes, batch_size)
    assert modes.policy.mode == WAS
    assert modes.leases.negotiation.rows == 0
    sent = len(ranks[0].sent)
    for _ in range(5):
        decode(modes, 20)
    assert len(ranks[0].sent) == sent


def test_before_anything_is_known_weights_are_streamed(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "auto")
    assert decode(modes, 1) == WAS
    assert modes.threshold is None
    assert ranks[0].sent == []


def test_the_threshold_follows_the_times(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "auto")
    modes.times = StepTimes(10e-3, {1: 1e-3, 64: 64e-3})
    decode(modes, 4)
    assert modes.threshold == modes.times.threshold(MAX_ROWS) == 10
    assert modes.policy.mode == CAS
    modes.times.fetch_seconds = 3e-3
    modes.policy = ModePolicy("was")  # messages don't matter here
    for _ in range(40):
        decode(modes, 4)
    assert modes.threshold == modes.times.threshold(MAX_ROWS) <= 4


class StubbornOwners:
    """Stands for the lease client: never grants; remembers for how long it was waited for."""

    def __init__(self) -> None:
        self.patience = 0.0

    def acquire(self, rows: int, seconds: float) -> bool:
        self.patience = seconds
        return False

    def ask(self, rows: int) -> None:
        pass


@pytest.mark.parametrize(
    ("times", "patience"),
    [
        (None, 2e-3),
        (StepTimes(1e-3, {1: 1e-4}), 2e-3),
        (StepTimes(40e-3, {1: 1e-3}), 10e-3),
        (StepTimes(1e-3, {1: 40e-3}), 10e-3),
        (StepTimes(10.0, {1: 1e-3}), 50e-3),
    ],
)
def test_answers_are_waited_for_a_part_of_a_was_step(
    times: StepTimes | None, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_modes, "_PATIENCE_SECONDS", (2e-3, 50e-3))
    owners = StubbornOwners()
    modes = StepModes(ModePolicy("cas"), owners, max_rows=MAX_ROWS)  # type: ignore[arg-type]
    modes.times = times
    assert decode(modes, 4) == WAS
    assert owners.patience == pytest.approx(patience)


def test_nothing_is_asked_for_while_an_answer_is_still_to_come(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "cas")
    assert modes.begin_decode(3, can_call=True) == CAS
    modes.end_decode(3, CAS, can_call=False)  # the owner fell silent in the middle of the step
    for _ in range(3):
        assert modes.begin_decode(3, can_call=False) == WAS
        modes.end_decode(3, WAS, can_call=False)
    assert len(ranks[0].requests) == 1
    assert modes.leases.negotiation.rows == 0


def test_a_threshold_out_of_reach_has_no_band_below_it(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "auto")
    modes.times = StepTimes(1.0, {1: 1e-3, 64: 2e-3})  # no batch hides such fetches
    assert decode(modes, MAX_ROWS + 1) == WAS
    for _ in range(DWELL_STEPS):
        mode = decode(modes, MAX_ROWS)
    assert modes.threshold == MAX_ROWS + 1
    assert mode == CAS


def test_a_threshold_set_while_running_counts_from_the_next_step(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "auto")
    modes.times = StepTimes(1.0, {1: 0.1})
    assert decode(modes, 8) == CAS
    modes.set_threshold(8)
    assert modes.threshold == 8
    assert [decode(modes, 8) for _ in range(DWELL_STEPS)][-1] == WAS
    modes.set_threshold(MAX_ROWS + 1)
    assert [decode(modes, MAX_ROWS) for _ in range(DWELL_STEPS)][-1] == CAS, "beyond all batches"
    modes.set_threshold(None)
    decode(modes, 8)
    assert modes.threshold == modes.times.threshold(MAX_ROWS), "measured again"


def test_steps_teach_nothing_while_a_threshold_is_set(ranks: list[Rank]) -> None:
    modes = step_modes_of(ranks[0], "auto")
    modes.observe(CAS, 8, 0.2, 0.0)  # nothing was measured yet
    modes.times = StepTimes(1.0, {1: 0.1})
    modes.observe(CAS, 8, 0.2, 0.0)
    modes.set_threshold(1)
    modes.observe(CAS, 8, 0.9, 0.0)
    assert modes.times.overhead_seconds(CAS, 8) == pytest.approx(0.1)
    modes.set_threshold(None)
    modes.observe(CAS, 8, 0.4, 0.0)
    assert modes.times.overhead_seconds(CAS, 8) == pytest.approx(0.2), "the median of 0.1 and 0.3"

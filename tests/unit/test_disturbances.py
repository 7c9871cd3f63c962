"""Faults on purpose: SGLang finds them, and they are as frequent as they were asked for."""

import time
import uuid
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch

from sidp_sgl.config import SidpConfig
from sidp_sgl.scheduler.control_plane import ControlPlane
from sidp_sgl.scheduler.modes.policy import CAS, WAS
from sidp_sgl.scheduler.modes.service_share import ServiceShare
from sidp_sgl.weightpool.transport.interface import PeerStripe
from sidp_sgl.weightpool.transport.shm.transport import ShmCopyStream
from tests.support import disturbances
from tests.support.disturbances import (
    Disturbances,
    DisturbedAnswers,
    ForcedSwitches,
    disturbed,
    install,
    poison,
)


def plugins() -> set[str]:
    return {plugin.value for plugin in entry_points(group="sglang.srt.plugins")}


def make_control_plane(engine_name: str) -> ControlPlane:
    return ControlPlane(SidpConfig(sidp=True), 0, 2, engine_name, ServiceShare())


def test_sglang_finds_the_plugin_while_it_is_wanted() -> None:
    plugin = f"{disturbances.__name__}:install"
    with disturbed(Disturbances()):
        assert plugin in plugins()
    assert plugin not in plugins()


def test_the_plugin_disturbs_the_control_planes_of_its_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ControlPlane, "__init__", ControlPlane.__init__)  # put back afterwards
    monkeypatch.setattr(ShmCopyStream, "_copy", ShmCopyStream._copy)
    install()
    plane = make_control_plane(uuid.uuid4().hex)
    assert plane.lease_server.refusal() is None, "without its variable the plugin does nothing"
    assert not isinstance(plane.modes.policy, ForcedSwitches)
    with disturbed(Disturbances(switch_every=5, decline=1.0)):
        plane = make_control_plane(uuid.uuid4().hex)
        assert plane.lease_server.refusal() == "disturbed"
        assert [plane.modes.policy.decide(1, None) for _ in range(6)] == [CAS] * 5 + [WAS]


def test_the_plugin_spoils_blocks_of_one_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlPlane, "__init__", ControlPlane.__init__)
    monkeypatch.setattr(ShmCopyStream, "_copy", ShmCopyStream._copy)
    install()

    def copied(owner: int) -> list[int]:
        stream, target = ShmCopyStream({}), torch.zeros(3, dtype=torch.uint8)
        stream.copy(target, PeerStripe(owner, torch.tensor([1, 2, 4], dtype=torch.uint8)))
        stream.synchronize()
        stream.close()
        return target.tolist()

    assert copied(1) == [1, 2, 4]
    with disturbed(Disturbances(wrong_owner=1)):
        assert copied(1) == [1, 2, 5] and copied(0) == [1, 2, 4]


def refusals(answers: DisturbedAnswers, count: int) -> list[str | None]:
    return [answers.refusal() for _ in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_as_many_requests_are_declined_as_was_asked_for(share: float) -> None:
    given = refusals(DisturbedAnswers(Disturbances(decline=share), rank=1), 2000)
    assert set(given) <= {None, "disturbed"}
    assert given.count("disturbed") == pytest.approx(2000 * share, abs=100 if 0 < share < 1 else 0)


def test_a_seed_gives_every_rank_declines_of_its_own_and_the_same_ones_again() -> None:
    def given(seed: int, rank: int) -> list[str | None]:
        return refusals(DisturbedAnswers(Disturbances(decline=0.5, seed=seed), rank), 64)

    assert given(1, 0) == given(1, 0)
    assert len({tuple(given(seed, rank)) for seed in range(3) for rank in range(4)}) == 12


def test_answers_are_delayed_as_long_as_was_asked_for() -> None:
    started = time.monotonic()
    refusals(DisturbedAnswers(Disturbances(delay=1.0, delay_ms=5.0), rank=0), 4)
    assert time.monotonic() - started >= 0.02
    started = time.monotonic()
    refusals(DisturbedAnswers(Disturbances(delay=0.0, delay_ms=1e4), rank=0), 4)
    assert time.monotonic() - started < 10  # one delay would be that long


@pytest.mark.parametrize("steps", [1, 4])
def test_modes_change_every_few_steps_whatever_the_batch(steps: int) -> None:
    policy = ForcedSwitches(steps)
    modes = [policy.decide(batch_size, threshold=8) for batch_size in range(1, 6 * steps + 1)]
    assert modes == ([CAS] * steps + [WAS] * steps) * 3
    assert policy.switches == policy.reasons["forced"] == 5
    assert policy.mode == WAS


def test_prompts_that_end_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    handled, ended = [], []

    class Scheduler:
        def handle_generate_request(self, request: SimpleNamespace) -> None:
            handled.append(request.input_text)

    monkeypatch.setattr(disturbances, "_end", ended.append)
    disturbances._take_poison(Scheduler)
    for text in ("1+1=", None, poison("rank")):
        Scheduler().handle_generate_request(SimpleNamespace(input_text=text))
    assert handled == ["1+1=", None, poison("rank")] and ended == ["rank"]

"""What set_internal_state may change of a rank: SGLang's own controller, with SiDP's handler."""

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import SetInternalStateReq
from sglang.srt.managers.scheduler_components import internal_state

from sidp_sgl.config import SidpConfig
from sidp_sgl.scheduler.modes.policy import ModePolicy
from sidp_sgl.scheduler.modes.step_modes import StepModes
from sidp_sgl.sglang_hooks.status.updates import UpdateHooks


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What SGLang's controller logs; whether loggers pass it on depends on what ran before."""
    lines: list[str] = []
    monkeypatch.setattr(
        internal_state, "logger", SimpleNamespace(warning=lines.append, info=lines.append)
    )
    return lines


class Rank:
    def __init__(self, mode: str = "auto") -> None:
        self.modes = StepModes(ModePolicy(mode), SimpleNamespace(), max_rows=64)  # type: ignore[arg-type]
        self.turned: list[bool] = []
        self._hooks = UpdateHooks(
            SidpConfig(sidp=True, sidp_mode=mode),
            self.modes.set_threshold,
            self.turned.append if mode == "auto" else None,
        )

    def update(self, **values: Any) -> bool:
        """As a scheduler takes it in."""
        controller = internal_state.SchedulerInternalStateController(SimpleNamespace(), False)
        own = controller._update_handlers()
        controller._update_handlers = lambda: self._hooks._add_handlers(own, controller)
        assert set(own) < set(controller._update_handlers()), "SGLang's own stay"
        return controller.set_internal_state(SetInternalStateReq(server_args=values)).updated


def test_the_threshold_is_set_and_measured_again() -> None:
    rank = Rank()
    assert rank.update(sidp_batch_threshold=48)
    assert rank.modes.threshold == 48
    assert rank.update(sidp_batch_threshold=1.0), "a number without fraction"
    assert rank.modes.threshold == 1
    assert rank.update(sidp_batch_threshold=0)
    assert rank.modes.threshold is None, "until it is measured"


@pytest.mark.parametrize("value", [-1, 1.5, float("nan"), float("inf")])
def test_what_is_no_batch_size_is_refused_and_said(value: float, warnings: list[str]) -> None:
    rank = Rank()
    rank.update(sidp_batch_threshold=48)
    assert not rank.update(sidp_batch_threshold=value)
    assert rank.modes.threshold == 48
    assert warnings == [
        f"sidp_batch_threshold {value} is not a batch size: use 1 or more, or 0 to measure it"
    ]


@pytest.mark.parametrize("mode", ["was", "cas"])
def test_it_has_no_effect_in_a_mode_that_was_given(mode: str, warnings: list[str]) -> None:
    rank = Rank(mode)
    assert not rank.update(sidp_batch_threshold=8)
    assert rank.modes.threshold is None
    assert warnings == [
        f"sidp_batch_threshold has no effect with --sidp-mode {mode}: restart with auto"
    ]


def test_residency_is_turned_off_and_on(warnings: list[str]) -> None:
    rank = Rank()
    assert rank.update(sidp_residency=0) and rank.update(sidp_residency=1)
    assert rank.turned == [False, True]
    assert not rank.update(sidp_residency=2)
    assert not Rank("was").update(sidp_residency=1)
    assert warnings[-2:] == [
        "sidp_residency 2 is not a switch: use 1 or 0",
        "sidp_residency has no effect: blocks stay with --sidp-mode auto, --sidp-residency auto, "
        "on CPU ranks",
    ]

"""What is hooked in the DP controller, with and without --sidp."""

import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest

from sidp_sgl.config import SidpConfig
from sidp_sgl.sglang_hooks import controller
from sidp_sgl.sglang_hooks.controller import controller_hooks
from sidp_sgl.sglang_hooks.cpu.sleeping_loop import sleeping_loop


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Last name of the target → function; and sees that every target is there, once."""
    monkeypatch.setattr(controller, "ControllerReports", lambda group: SimpleNamespace(start=group))
    monkeypatch.setattr(
        controller, "DispatchLoop", lambda *_, **__: SimpleNamespace(event_loop="ours")
    )

    def hooks(config: SidpConfig | None, device_name: str = "sidp_cpu") -> dict[str, Any]:
        platform = SimpleNamespace(device_name=device_name)
        monkeypatch.setattr(controller, "current_platform", platform)
        found = controller_hooks(config, 2)
        assert all(callable(pkgutil.resolve_name(hook.target)) for hook in found)
        assert len({hook.target for hook in found}) == len(found)
        return {hook.target.rpartition(".")[2]: hook.function for hook in found}

    return hooks


def test_without_sidp_a_controller_on_a_cpu_sleeps(hooked: Any) -> None:
    assert hooked(None) == {"event_loop": sleeping_loop}
    assert hooked(None, "cuda") == {}


def test_with_sidp_ranks_are_watched_and_requests_dispatched(hooked: Any) -> None:
    config = SidpConfig(sidp=True).of_engine("group", "auto", is_server=False)
    found = hooked(config)
    assert found["start"] == "group" and found["event_loop"] == "ours"
    assert hooked(config, "cuda") == found
    colocated = SidpConfig(sidp=True, sidp_colocate=True).of_engine(
        "group", "auto", is_server=False
    )
    assert hooked(colocated, "cuda").keys() == {*found, "launch_tensor_parallel_group"}


def test_sglangs_own_dispatch_stays_but_does_not_spin_on_a_cpu(hooked: Any) -> None:
    config = SidpConfig(sidp=True).of_engine("group", "round_robin", is_server=False)
    assert hooked(config)["event_loop"] is sleeping_loop
    assert "event_loop" not in hooked(config, "cuda")

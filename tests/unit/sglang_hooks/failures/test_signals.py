"""The event loop in which a script's answers arrive is one for good."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sidp_sgl.config import SidpConfig
from sidp_sgl.errors import SidpUsageError
from sidp_sgl.sglang_hooks import arguments
from sidp_sgl.sglang_hooks.failures import guards, signals


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Of a script's engine, after SGLang's way: it keeps the first loop."""
    monkeypatch.setattr(guards, "_guards", {"fake": SimpleNamespace(engine="fake")})
    monkeypatch.setattr(signals, "_in_main_thread", lambda: False)
    server_args = SimpleNamespace()
    arguments.attach(server_args, SidpConfig(sidp=True).of_engine("fake", "auto", is_server=False))
    return SimpleNamespace(server_args=server_args, event_loop=None, _server_stop_hook=None)


def sglangs(manager: Any) -> None:
    if manager.event_loop is None:
        manager.event_loop = asyncio.get_running_loop()


async def call(manager: Any) -> None:
    signals._auto_create_handle_loop(sglangs, manager)


def test_calls_in_one_loop_pass(manager: SimpleNamespace) -> None:
    async def several() -> None:
        for _ in range(3):
            await call(manager)

    asyncio.run(several())


def test_another_loop_is_an_error_with_the_remedy(manager: SimpleNamespace) -> None:
    asyncio.run(call(manager))
    with pytest.raises(SidpUsageError, match=r"within one asyncio\.run\(\)"):
        asyncio.run(call(manager))


def test_servers_and_engines_without_sidp_are_left_alone(manager: SimpleNamespace) -> None:
    manager._server_stop_hook = print
    asyncio.run(call(manager))
    asyncio.run(call(manager))
    manager._server_stop_hook, manager.server_args = None, SimpleNamespace()
    asyncio.run(call(manager))

"""Failures as callers see them: an exception, an HTTP error, an event of a stream."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import fastapi
import pytest

from sidp_sgl.config import SidpConfig
from sidp_sgl.scheduler.lifecycle.liveness import RankFailure
from sidp_sgl.sglang_hooks import arguments
from sidp_sgl.sglang_hooks.failures import guards, pending, signals


class FakeGuard:
    """Fails when it is asked for the `fails_at`-th time."""

    def __init__(self, fails_at: int) -> None:
        self.engine = "fake"
        self.is_closed = False
        self.failures: list[str] = []
        self._left = fails_at
        self.is_draining: Callable[[], bool] = lambda: False

    async def unless_failed(self, call: Callable[[], Awaitable[Any]]) -> Any:
        if self._left == 0:
            raise RankFailure("DP rank 1 was killed")
        self._left -= 1
        return await call()

    def fail(self, event: str, details: str) -> None:
        self.failures.append(event + details)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def no_other_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_guards", {})


def manager(guard: FakeGuard | None, is_server: bool = False) -> SimpleNamespace:
    server_args = SimpleNamespace()
    if guard is not None:
        arguments.attach(
            server_args, SidpConfig(sidp=True).of_engine(guard.engine, "auto", is_server=False)
        )
        guards.add(guard)  # type: ignore[arg-type]
    return SimpleNamespace(server_args=server_args, _server_stop_hook=print if is_server else None)


async def respond(*_: Any) -> AsyncIterator[int]:
    for number in range(3):
        yield number


def collect(guard: FakeGuard, path: str | None, stream: bool) -> tuple[list[int], Exception | None]:
    """What arrives of three responses, and what ends them."""
    request = None if path is None else SimpleNamespace(url=SimpleNamespace(path=path))

    async def run() -> tuple[list[int], Exception | None]:
        arrived = []
        obj = SimpleNamespace(stream=stream)
        try:
            async for out in pending._generate_request(respond, manager(guard), obj, request):
                arrived.append(out)
        except Exception as error:
            return arrived, error
        return arrived, None

    return asyncio.run(run())


def test_all_responses_pass_where_nothing_fails() -> None:
    assert collect(FakeGuard(99), "/generate", stream=True) == ([0, 1, 2], None)


@pytest.mark.parametrize(
    ("fails_at", "path", "stream", "kind"),
    [
        (0, None, False, RankFailure),
        (2, None, True, RankFailure),
        (0, "/generate", False, pending.Unavailable),
        (0, "/generate", True, pending.StreamBroken),
        (2, "/generate", True, pending.StreamBroken),
        (0, "/v1/completions", False, pending.Unavailable),
        (0, "/v1/completions", True, pending.Unavailable),
        (1, "/v1/completions", True, pending.StreamBroken),
    ],
)
def test_how_a_request_ends(fails_at: int, path: str | None, stream: bool, kind: type) -> None:
    arrived, error = collect(FakeGuard(fails_at), path, stream)
    assert arrived == list(range(fails_at))
    assert type(error) is kind and str(error) == "DP rank 1 was killed"


def test_what_sglang_makes_of_the_errors() -> None:
    unavailable, broken = pending.Unavailable("gone"), pending.StreamBroken("gone")
    assert isinstance(unavailable, fastapi.HTTPException) and not isinstance(
        unavailable, ValueError
    )
    assert (unavailable.status_code, unavailable.detail) == (503, "gone")
    assert isinstance(broken, ValueError) and broken.status_code == 503


def test_engines_without_sidp_are_left_alone() -> None:
    responses = respond()
    plain = manager(None)
    assert pending._generate_request(lambda *_: responses, plain, None) is responses


@pytest.mark.parametrize(("is_server", "kind"), [(False, RankFailure), (True, pending.Unavailable)])
def test_how_a_control_call_ends(is_server: bool, kind: type) -> None:
    owner = manager(FakeGuard(0), is_server)

    async def never() -> None:
        raise AssertionError("called on a failed engine")

    with pytest.raises(RankFailure) as caught:
        asyncio.run(pending._until_failure(owner, never))
    assert caught.type is kind


@pytest.fixture
def guard() -> FakeGuard:
    made = FakeGuard(99)
    guards.add(made)  # type: ignore[arg-type]
    return made


def kill(*arguments: Any, **keywords: Any) -> list[tuple]:
    """SGLang's kill_process_tree behind the hook; returns the calls that come through."""
    calls: list[tuple] = []
    signals._kill_process_tree(lambda *args, **_: calls.append(args), *arguments, **keywords)
    return calls


def test_sglang_does_not_kill_the_user_s_process(guard: FakeGuard) -> None:
    assert not kill(os.getpid())
    assert guard.failures == ["SGLang's main process gave up: see the log above"]
    guard.is_closed = True
    assert kill(os.getpid()) == [(os.getpid(), True)]  # no engine with --sidp: as in SGLang


def test_sglang_still_kills_other_processes(guard: FakeGuard) -> None:
    assert kill(4711) == [(4711, True)]
    assert kill(os.getpid(), include_parent=False) == [(os.getpid(), False)]
    assert not guard.is_closed and not guard.failures


def test_a_draining_server_closes_its_guard_first(guard: FakeGuard) -> None:
    guard.is_draining = lambda: True
    assert kill(os.getpid(), include_parent=False)
    assert guard.is_closed


def test_shutdown_leaves_other_children_alone(guard: FakeGuard) -> None:
    with guards.ending(guard):  # type: ignore[arg-type]
        assert not kill(os.getpid(), include_parent=False)
    assert not guard.failures

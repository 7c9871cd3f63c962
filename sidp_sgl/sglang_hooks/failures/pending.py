"""Requests and control calls of an engine with --sidp end with an error when the engine fails.

All of them wait in coroutines of the main process; the guard cancels what waits, and here the
cancellation becomes the exception that the caller understands.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import fastapi
from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.scheduler.lifecycle.guard import Guard
from sidp_sgl.scheduler.lifecycle.liveness import RankFailure
from sidp_sgl.sglang_hooks.failures import guards
from sidp_sgl.sglang_hooks.required import Hook

_UNAVAILABLE = 503
_END = object()


class Unavailable(RankFailure, fastapi.HTTPException):
    """The failure as the response to an HTTP request: status 503."""

    def __init__(self, message: str) -> None:
        fastapi.HTTPException.__init__(self, status_code=_UNAVAILABLE, detail=message)

    def __str__(self) -> str:
        return self.detail


class StreamBroken(RankFailure, ValueError):
    """The failure in a response that streams already: SGLang sends ValueErrors as events."""

    status_code = _UNAVAILABLE


def _generate_request(original: Any, manager: Any, obj: Any, request: Any = None) -> Any:
    """`TokenizerManager.generate_request`: every request, single, batch or stream."""
    guard = guards.of(manager)
    responses = original(manager, obj, request)
    return responses if guard is None else _guarded(guard, responses, obj, request)


async def _guarded(
    guard: Guard, responses: Any, obj: Any, request: fastapi.Request | None
) -> AsyncIterator[Any]:
    # The native endpoint begins its stream before the first response.
    streams = getattr(obj, "stream", False) and request is not None
    has_begun = streams and request is not None and request.url.path == "/generate"
    async with aclosing(responses):
        while True:
            try:
                response = await guard.unless_failed(lambda: anext(responses, _END))
            except RankFailure as failure:
                if request is None:
                    raise
                raise (StreamBroken if has_begun else Unavailable)(str(failure)) from None
            if response is _END:
                return
            yield response
            has_begun = streams


async def _communicate(original: Any, communicator: Any, obj: Any) -> Any:
    """`FanOutCommunicator.__call__`: a question to all ranks, such as their internal states."""
    manager = getattr(communicator._send, "__self__", None)
    return await _until_failure(manager, lambda: original(communicator, obj))


async def _open_session(original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
    return await _until_failure(manager, lambda: original(manager, *args, **kwargs))


async def _until_failure(manager: Any, call: Any) -> Any:
    guard = guards.of(manager)
    if guard is None:
        return await call()
    try:
        return await guard.unless_failed(call)
    except RankFailure as failure:
        if manager._server_stop_hook is None:
            raise
        raise Unavailable(str(failure)) from None


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
HOOKS = [
    Hook(f"{_MANAGER}.generate_request", _generate_request, HookType.AROUND),
    Hook(f"{_MANAGER}.open_session", _open_session, HookType.AROUND),
    Hook(
        "sglang.srt.managers.communicator.FanOutCommunicator.__call__",
        _communicate,
        HookType.AROUND,
    ),
]

"""The HTTP server of a failed engine answers what is pending, then ends with exit code 1."""

import os
import time
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks import arguments
from sidp_sgl.sglang_hooks.failures import guards
from sidp_sgl.sglang_hooks.required import Hook

_ANSWER_SECONDS = 1.0  # for the error responses to reach their clients
_STOP_SECONDS = 4.0  # for the server to end by itself


def _run_server(original: Any, server_args: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    """`http_server._setup_and_run_http_server`: returns when the server has stopped."""
    guard = guards.of_arguments(server_args)
    if guard is None:
        return original(server_args, manager, *args, **kwargs)
    is_command_line = arguments.is_command_line(server_args)
    guard.is_draining = lambda: manager.gracefully_exit
    guard.after_failure = lambda: _stop_server(manager, is_command_line)
    try:
        guard.raise_if_ended()
        original(server_args, manager, *args, **kwargs)
    finally:
        guard.close()
        if guard.failure is not None:
            raise SystemExit(1) if is_command_line else guard.failure


def _stop_server(manager: Any, is_command_line: bool) -> None:
    manager.gracefully_exit = True  # health checks answer 503 at once
    time.sleep(_ANSWER_SECONDS)
    if manager._server_stop_hook is not None:
        manager._server_stop_hook()
    if is_command_line:
        time.sleep(_STOP_SECONDS)
        os._exit(1)  # a client that does not read keeps the server from ending


HOOKS = [
    Hook(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        _run_server,
        HookType.AROUND,
    ),
]

"""An engine with --sidp in its main process, from start to end, so that no failure hangs it.

Plain SGLang waits for ever for a rank that was killed, and kills the user's process when one
raises. With --sidp a `Guard` sees every process of the engine, from before the first until after
the last; the hooks here make and close it.
"""

import logging
import multiprocessing
import os
import sys
import tempfile
import time
from typing import Any

from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_parallel

from sidp_sgl.scheduler.lifecycle.guard import Guard, spawning
from sidp_sgl.scheduler.lifecycle.liveness import (
    ENGINE,
    RankFailure,
    Unguarded,
    UnguardedScript,
    end_with,
)
from sidp_sgl.scheduler.member import members
from sidp_sgl.sglang_hooks import arguments, required
from sidp_sgl.sglang_hooks.failures import guards, pending, signals, sockets
from sidp_sgl.sglang_hooks.required import Hook

logger = logging.getLogger(__name__)

_ENGINE = "sglang.srt.entrypoints.engine.Engine"
_SERVER = "sglang.srt.entrypoints.http_server"
_ANSWER_SECONDS = 1.0  # for the error responses to reach their clients
_STOP_SECONDS = 4.0  # for the server to end by itself


def install() -> None:
    """Every process, before argument parsing; the other hooks come with the first such engine."""
    required.apply([Hook(f"{_ENGINE}._launch_subprocesses", _launch, HookType.AROUND)])


def _launch(original: Any, cls: type, *args: Any, **kwargs: Any) -> Any:
    """`Engine._launch_subprocesses`, of `sgl.Engine` and of the server."""
    server_args = kwargs.get("server_args", args[0] if args else None)
    config = arguments.config_of(server_args)
    if config is None:
        return original(cls, *args, **kwargs)
    if _is_starting_up() and (engine := os.environ.get(ENGINE)):
        end_with(engine, Unguarded())
    required.apply([*_HOOKS, *pending.HOOKS, *signals.HOOKS])
    if _SERVER in sys.modules:
        required.apply([_SERVER_HOOK])
    is_command_line = arguments.is_command_line(server_args)
    guard = Guard(config.engine, _print_line if is_command_line else _log)
    guards.add(guard)
    # cuda.tile would make a directory per process, which a process that is killed leaves.
    os.environ.setdefault("CUDA_TILE_TEMP_DIR", tempfile.gettempdir())
    try:
        with sockets.closed_on_failure():
            launched = original(cls, *args, **kwargs)
            parallel = get_parallel()
            guard.ready(members(parallel.num_dp_ranks, parallel.tp_size))
    except BaseException as error:
        failure = None if isinstance(error, KeyboardInterrupt) else guard.explanation()
        guard.close()
        if failure is None:
            raise
        if is_command_line or isinstance(failure, UnguardedScript):
            raise SystemExit(1) from None
        raise failure from None
    return launched


def _is_starting_up() -> bool:
    """Whether this process still runs the main process's script, as spawned ones do first."""
    return getattr(multiprocessing.current_process(), "_inheriting", False)


def _print_line(failure: RankFailure) -> None:
    print(f"error: {failure}", file=sys.stderr, flush=True)


def _log(failure: RankFailure) -> None:
    if isinstance(failure, UnguardedScript):
        _print_line(failure)  # nobody can catch it in a script that is run again and again
    else:
        logger.error("%s", failure)


def _launch_ranks(original: Any, cls: type, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """`Engine._launch_scheduler_processes`: starts the DP controller, which starts the ranks."""
    guard = guards.of(server_args)
    if guard is None:
        return original(cls, server_args, *args, **kwargs)
    signals.handle_sigquit(guard, server_args)
    with spawning(guard.engine):
        result, processes = original(cls, server_args, *args, **kwargs)
        for process in processes:
            guard.watch(process, "the DP controller")
    return result, processes


def _launch_detokenizers(original: Any, cls: type, *args: Any, **kwargs: Any) -> Any:
    """`Engine._launch_detokenizer_subprocesses`."""
    guard = guards.of(kwargs.get("server_args", args[0] if args else None))
    if guard is None:
        return original(cls, *args, **kwargs)
    with spawning(guard.engine):
        processes, names = original(cls, *args, **kwargs)
        for process, name in zip(processes, names, strict=True):
            guard.watch(process, f"the {name}")
    return processes, names


def _shutdown(original: Any, engine: Any) -> None:
    """`Engine.shutdown`, also called at exit."""
    guard = guards.of(engine)
    if guard is None:
        return original(engine)
    guard.close()
    with guards.ending(guard):
        original(engine)


def _run_server(original: Any, server_args: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    """`http_server._setup_and_run_http_server`: returns when the server has stopped."""
    guard = guards.of(server_args)
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
    """What is pending gets its answer first; the exit code is 1."""
    manager.gracefully_exit = True  # health checks answer 503 at once
    time.sleep(_ANSWER_SECONDS)
    if manager._server_stop_hook is not None:
        manager._server_stop_hook()
    if is_command_line:
        time.sleep(_STOP_SECONDS)
        os._exit(1)  # a client that does not read keeps the server from ending


_HOOKS = [
    Hook(f"{_ENGINE}._launch_scheduler_processes", _launch_ranks, HookType.AROUND),
    Hook(f"{_ENGINE}._launch_detokenizer_subprocesses", _launch_detokenizers, HookType.AROUND),
    Hook(f"{_ENGINE}.shutdown", _shutdown, HookType.AROUND),
]
_SERVER_HOOK = Hook(f"{_SERVER}._setup_and_run_http_server", _run_server, HookType.AROUND)

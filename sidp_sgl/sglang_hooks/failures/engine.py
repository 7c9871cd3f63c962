"""Starting and ending an engine with --sidp in its main process, so that no failure hangs it.

Plain SGLang waits for ever for a rank that was killed, and kills the user's process when one
raises. With --sidp a `Guard` sees every process of the engine, from before the first until after
the last; the hooks here make and close it.
"""

import logging
import os
import sys
import tempfile
from typing import Any

import zmq
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_parallel

from sidp_sgl.scheduler.lifecycle.guard import Guard, spawning
from sidp_sgl.scheduler.lifecycle.liveness import RankFailure
from sidp_sgl.scheduler.member import members
from sidp_sgl.sglang_hooks import arguments, required
from sidp_sgl.sglang_hooks.failures import guards, pending, server, signals
from sidp_sgl.sglang_hooks.required import Hook

logger = logging.getLogger(__name__)

_ENGINE = "sglang.srt.entrypoints.engine.Engine"


def install() -> None:
    """Every process, before argument parsing; the other hooks come with the first such engine."""
    required.apply([Hook(f"{_ENGINE}._launch_subprocesses", _launch, HookType.AROUND)])


def _launch(original: Any, cls: type, *args: Any, **kwargs: Any) -> Any:
    """`Engine._launch_subprocesses`, of `sgl.Engine` and of the server."""
    server_args = kwargs.get("server_args", args[0] if args else None)
    config = arguments.config_of(server_args)
    if config is None:
        return original(cls, *args, **kwargs)
    required.apply([*_HOOKS, *pending.HOOKS, *signals.HOOKS])
    if "sglang.srt.entrypoints.http_server" in sys.modules:
        required.apply(server.HOOKS)
    is_command_line = arguments.is_command_line(server_args)
    guard = Guard(config.group, _print_line if is_command_line else _log)
    guards.add(guard)
    # cuda.tile would make a directory per process, which a process that is killed leaves.
    os.environ.setdefault("CUDA_TILE_TEMP_DIR", tempfile.gettempdir())
    try:
        launched = original(cls, *args, **kwargs)
        parallel = get_parallel()
        guard.ready(members(parallel.num_dp_ranks, parallel.tp_size))
    except BaseException as error:
        failure = None if isinstance(error, KeyboardInterrupt) else guard.explanation()
        guard.close()
        _close_sockets(guards.manager_of(guard))
        if failure is None:
            raise
        raise SystemExit(1) if is_command_line else failure from None
    return launched


def _print_line(failure: RankFailure) -> None:
    print(f"error: {failure}", file=sys.stderr, flush=True)


def _log(failure: RankFailure) -> None:
    logger.error("%s", failure)


def _attach(_: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    """`TokenizerManager.init_ipc_channels`."""
    guard = guards.of_arguments(manager.server_args)
    if guard is not None:
        guards.attach(guard, manager)


def _close_sockets(manager: Any) -> None:
    """Of an engine that nobody gets to see: garbage collection would wait for ever for them."""
    for value in list(vars(manager).values()) if manager is not None else []:
        if isinstance(value, zmq.Socket):
            value.close(linger=0)


def _launch_ranks(original: Any, cls: type, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """`Engine._launch_scheduler_processes`: starts the DP controller, which starts the ranks."""
    guard = guards.of_arguments(server_args)
    if guard is None:
        return original(cls, server_args, *args, **kwargs)
    signals.handle_sigquit(guard, server_args)
    with spawning():
        result, processes = original(cls, server_args, *args, **kwargs)
        for process in processes:
            guard.watch(process, "the DP controller")
    return result, processes


def _launch_detokenizers(original: Any, cls: type, *args: Any, **kwargs: Any) -> Any:
    """`Engine._launch_detokenizer_subprocesses`."""
    guard = guards.of_arguments(kwargs.get("server_args", args[0] if args else None))
    if guard is None:
        return original(cls, *args, **kwargs)
    with spawning():
        processes, names = original(cls, *args, **kwargs)
        for process, name in zip(processes, names, strict=True):
            guard.watch(process, f"the {name}")
    return processes, names


def _shutdown(original: Any, engine: Any) -> None:
    """`Engine.shutdown`, also called at exit."""
    guard = guards.of_arguments(getattr(engine, "server_args", None))
    if guard is None:
        return original(engine)
    guard.close()
    with guards.ending(guard):
        original(engine)


_HOOKS = [
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.init_ipc_channels",
        _attach,
        HookType.AFTER,
    ),
    Hook(f"{_ENGINE}._launch_scheduler_processes", _launch_ranks, HookType.AROUND),
    Hook(f"{_ENGINE}._launch_detokenizer_subprocesses", _launch_detokenizers, HookType.AROUND),
    Hook(f"{_ENGINE}.shutdown", _shutdown, HookType.AROUND),
]

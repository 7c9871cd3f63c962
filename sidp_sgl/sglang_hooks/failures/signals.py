"""Keeps SGLang from killing the user's process over a child of the engine, and from going deaf.

Where SGLang would kill its own process, the engine fails instead, and its callers get an exception;
SIGTERM does to a script with an engine what the script says.
"""

import asyncio
import os
import signal
import threading
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.scheduler.lifecycle.guard import Guard
from sidp_sgl.sglang_hooks.failures import guards
from sidp_sgl.sglang_hooks.required import Hook

_SEE_LOG = ": see the log above"


def handle_sigquit(guard: Guard, server_args: Any) -> None:
    """Take SIGQUIT over from SGLang, which kills this process on it, until requests come."""
    if _in_main_thread() and server_args.custom_sigquit_handler is None:
        signal.signal(signal.SIGQUIT, lambda *_: _on_sigquit(guard))


def _on_sigquit(guard: Guard) -> None:
    """SGLang's processes send it to their parent when they give up or hang."""
    if guard.is_closed:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGQUIT)
    else:
        guard.fail_soon("a process of the engine gave up", _SEE_LOG)


def _running_phase_sigquit_handler(original: Any, handler: Any, *args: Any, **kwargs: Any) -> None:
    guard = guards.of(handler.tokenizer_manager)
    if guard is None:
        return original(handler, *args, **kwargs)
    _on_sigquit(guard)


def _auto_create_handle_loop(original: Any, manager: Any) -> None:
    """SGLang has the event loop handle SIGTERM; a script's loop runs during its calls only."""
    guard = guards.of(manager)
    is_script = guard is not None and manager._server_stop_hook is None
    if is_script:
        _check_loop(manager.event_loop)
    before = signal.getsignal(signal.SIGTERM)
    is_first = manager.event_loop is None
    original(manager)
    if is_script and is_first and _in_main_thread() and before is not None:
        manager.event_loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)


def _check_loop(known: asyncio.AbstractEventLoop | None) -> None:
    """Answers arrive in the loop of the first call, so that in another one nothing would ever."""
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        return
    if known not in (None, running):
        raise SidpUsageError(
            "the engine's answers arrive in the event loop of its first call, and this is another "
            "one: make all calls within one asyncio.run(), or all by "
            "engine.loop.run_until_complete()"
        )


def _check_processes(original: Any, watchdog: Any) -> bool:
    """`SubprocessWatchdog`'s look at its processes, which the guard watches better."""
    if any(guard.watches(p) for guard in guards.every() for p in watchdog._processes):
        return False
    return original(watchdog)


def _kill_process_tree(
    original: Any, parent_pid: int | None, include_parent: bool = True, *args: Any, **kwargs: Any
) -> None:
    """SGLang calls it on its own process to end an engine, and when it gives up altogether."""
    if parent_pid not in (None, os.getpid()):
        return original(parent_pid, include_parent, *args, **kwargs)
    if guards.is_ending():
        return None  # the engine's processes are gone; all other children are not SGLang's
    running = [guard for guard in guards.every() if not guard.is_closed]
    if running and parent_pid is not None and include_parent:
        for guard in running:
            guard.fail("SGLang's main process gave up", _SEE_LOG)
        return None
    for guard in running:
        if guard.is_draining():
            guard.close()
    return original(parent_pid, include_parent, *args, **kwargs)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


_MANAGER = "sglang.srt.managers.tokenizer_manager"
HOOKS = [
    Hook(
        f"{_MANAGER}.SignalHandler.running_phase_sigquit_handler",
        _running_phase_sigquit_handler,
        HookType.AROUND,
    ),
    Hook(
        f"{_MANAGER}.TokenizerManager.auto_create_handle_loop",
        _auto_create_handle_loop,
        HookType.AROUND,
    ),
    Hook(
        "sglang.srt.utils.watchdog.SubprocessWatchdog._check_processes",
        _check_processes,
        HookType.AROUND,
    ),
    Hook("sglang.srt.utils.common.kill_process_tree", _kill_process_tree, HookType.AROUND),
]

"""The guards of this process's engines with --sidp, found by what SGLang passes around.

Engines without --sidp have none, which makes every hook here inert for them.
"""

import contextvars
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sidp_sgl.scheduler.lifecycle.guard import Guard
from sidp_sgl.sglang_hooks import arguments

_guards: dict[str, Guard] = {}  # by group; closed ones stay, for late calls on their engines
_managers: dict[str, weakref.ref] = {}  # tokenizer managers by group
_ending: contextvars.ContextVar[Guard | None] = contextvars.ContextVar("ending", default=None)


def add(guard: Guard) -> None:
    _guards[guard.group] = guard


def every() -> list[Guard]:
    """Of all engines that this process has started, also ended ones."""
    return list(_guards.values())


def of_arguments(server_args: Any) -> Guard | None:
    config = arguments.config_of(server_args)
    return None if config is None else _guards.get(config.group)


def of_manager(manager: Any) -> Guard | None:
    """By a tokenizer manager."""
    return getattr(manager, "_sidp_guard", None)


def attach(guard: Guard, manager: Any) -> None:
    manager._sidp_guard = guard
    _managers[guard.group] = weakref.ref(manager)


def manager_of(guard: Guard) -> Any:
    """None where the engine has not come so far, or is forgotten."""
    reference = _managers.get(guard.group)
    return None if reference is None else reference()


@contextmanager
def ending(guard: Guard) -> Iterator[None]:
    """Inside, SGLang shuts this engine down; its processes have ended already."""
    token = _ending.set(guard)
    try:
        yield
    finally:
        _ending.reset(token)


def is_ending() -> bool:
    return _ending.get() is not None

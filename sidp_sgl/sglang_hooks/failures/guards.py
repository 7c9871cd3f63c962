"""The guards of this process's engines with --sidp, found by what SGLang passes around.

Engines without --sidp have none, which makes every hook here inert for them.
"""

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sidp_sgl.scheduler.lifecycle.guard import Guard
from sidp_sgl.sglang_hooks import arguments

_guards: dict[str, Guard] = {}  # by engine; closed ones stay, for late calls on their engines
_ending: contextvars.ContextVar[Guard | None] = contextvars.ContextVar("ending", default=None)


def add(guard: Guard) -> None:
    _guards[guard.engine] = guard


def every() -> list[Guard]:
    """Of all engines that this process has started, also ended ones."""
    return list(_guards.values())


def of(owner: Any) -> Guard | None:
    """By ServerArgs, or by an engine or a tokenizer manager, which have them."""
    config = arguments.config_of(getattr(owner, "server_args", owner))
    return None if config is None else _guards.get(config.engine)


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

"""Applies hooks and makes sure of them: SGLang's registry swallows a missing target.

A process that did not get every hook it needs must not go on.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.version import __version__ as sglang_version

from sidp_sgl.errors import SidpError

SUPPORTED_SGLANG = "0.5.23"


class Hook(NamedTuple):
    """One place of SGLang that is hooked: dotted path, function, way of hooking."""

    target: str
    function: Callable
    kind: HookType


_applied: dict[tuple[str, HookType], str] = {}  # name of the function


def apply(hooks: Iterable[Hook]) -> None:
    """Apply `hooks`, each once per process. Raises SidpError naming a target that is not there, and
    ValueError for a second one of a kind at the same target: their order would be nobody's choice.

    Wraps whatever is at the target now, also what another plugin has put there
    (`HookRegistry.apply_hooks` would pass over such a target in silence).
    """
    for target, function, kind in hooks:
        name = f"{function.__module__}.{function.__qualname__}"
        if (present := _applied.get((target, kind))) is not None:
            if present != name:
                raise ValueError(f"{target} is hooked by both {present} and {name}")
            continue
        try:
            HookRegistry._apply_target(target, [(kind, function, None)])
        except Exception as error:
            raise SidpError(
                f"--sidp: SGLang {sglang_version} has no {target} to hook ({error}); "
                f"install sglang=={SUPPORTED_SGLANG}"
            ) from error
        HookRegistry._patched.add(target)
        _applied[target, kind] = name


def check_version() -> None:
    """Raise SidpError where SGLang is not the version that the hooks were made for."""
    if sglang_version != SUPPORTED_SGLANG and not sglang_version.startswith(SUPPORTED_SGLANG + "."):
        raise SidpError(
            f"--sidp: made for SGLang {SUPPORTED_SGLANG}, found {sglang_version}; "
            f"install sglang=={SUPPORTED_SGLANG}"
        )

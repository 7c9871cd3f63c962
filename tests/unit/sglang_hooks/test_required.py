"""Hooks are where they should be, or nothing goes on."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.errors import SidpError
from sidp_sgl.sglang_hooks import required
from sidp_sgl.sglang_hooks.required import Hook

PLACE = SimpleNamespace(answer=lambda: [])
TARGET = f"{__name__}.PLACE.answer"


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(PLACE, "answer", lambda: ["SGLang"])
    monkeypatch.setattr(required, "_applied", {})
    yield
    required.HookRegistry._patched.discard(TARGET)


def first(result: list[str]) -> list[str]:
    return [*result, "first"]


def second(result: list[str]) -> list[str]:
    return [*result, "second"]


def around(original: Any) -> list[str]:
    return ["around", *original()]


def test_a_hook_is_applied_once() -> None:
    for _ in range(2):
        required.apply([Hook(TARGET, first, HookType.AFTER)])
    assert PLACE.answer() == ["SGLang", "first"]


def test_a_second_hook_of_a_kind_is_refused() -> None:
    required.apply([Hook(TARGET, first, HookType.AFTER), Hook(TARGET, around, HookType.AROUND)])
    with pytest.raises(ValueError, match=r"PLACE\.answer is hooked by both .*first and .*second"):
        required.apply([Hook(TARGET, second, HookType.AFTER)])
    assert PLACE.answer() == ["around", "SGLang", "first"]


def test_a_missing_target_is_named() -> None:
    hook = Hook("sglang.srt.server_args.ServerArgs.gone", print, HookType.AFTER)
    with pytest.raises(SidpError, match=r"no sglang\.srt\.server_args\.ServerArgs\.gone to hook"):
        required.apply([hook])

"""The actor of examples/ray_data.py, without Ray and without an engine."""

import asyncio
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sidp_sgl.scheduler.lifecycle.liveness import RankFailure


class Engine:
    """Answers what a prompt says."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()

    async def async_generate(self, prompt: str, sampling: dict[str, Any]) -> dict[str, Any]:
        if prompt == "too long":
            raise ValueError("longer than the model's context length")
        if prompt == "lost rank":
            raise RankFailure("DP rank 1 was killed")
        aborted = {"type": "abort", "message": "out of KV cache"}
        reason = aborted if prompt == "aborted" else {"type": "stop"}
        return {
            "text": "" if prompt == "aborted" else prompt,
            "meta_info": {"finish_reason": reason},
        }

    def get_server_info(self) -> dict[str, Any]:
        return {"internal_states": [{"sidp": {"was": {"fetches": 7}}}]}

    def shutdown(self) -> None:
        self.loop.close()


class Ended(BaseException):
    pass


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    ray = SimpleNamespace(util=SimpleNamespace(get_node_ip_address=lambda: "10.0.0.7"))
    monkeypatch.setitem(sys.modules, "ray", ray)  # an extra, which may not be there
    monkeypatch.setitem(sys.modules, "sglang", SimpleNamespace(Engine=Engine))
    monkeypatch.delitem(sys.modules, "examples.ray_data", raising=False)
    yield importlib.import_module("examples.ray_data")
    sys.modules.pop("examples.ray_data", None)


def answers(example: ModuleType, *prompts: str) -> dict[str, Any]:
    return example.Generate({}, {"max_new_tokens": 4})({"prompt": np.array(prompts)})


def test_a_row_has_its_answer_or_its_error(example: ModuleType) -> None:
    rows = answers(example, "a", "too long", "b", "aborted")
    assert list(rows["output"]) == ["a", "", "b", ""]
    assert list(rows["error"]) == [
        "",
        "longer than the model's context length",
        "",
        "out of KV cache",
    ]
    assert list(rows["blocks_fetched"]) == [7] * 4


def test_a_lost_rank_ends_the_actors_process(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(example.os, "_exit", end)
    with pytest.raises(Ended, match="1"):
        answers(example, "a", "lost rank", "b")
    assert "DP rank 1 was killed" in capsys.readouterr().err

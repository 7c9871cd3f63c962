"""What is said of a machine's GPUs, and that the package knows what bench/results does."""

import json
import logging
from pathlib import Path

import pytest
import torch

from sidp_sgl.planner.gpus import GPUS
from sidp_sgl.scheduler.member import Member
from sidp_sgl.sglang_hooks.cuda import gpus

RESULTS = Path(__file__).parents[4] / "bench" / "results"
FIRST = Member(0)


def test_verified_are_those_with_a_result() -> None:
    found = set()
    for path in RESULTS.glob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.get("bench") == "gpu_verify":
            assert not [n for n, result in content["results"].items() if result["ok"] is False]
            found |= {gpu["name"] for gpu in content["hardware"]["gpus"]}
    assert found == set(gpus.VERIFIED)


def test_links_are_those_that_the_planner_counts_with() -> None:
    assert set(gpus.LINK_GBPS.values()) <= {gpu.nvlink_gbps for gpu in GPUS}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    caplog.set_level(logging.INFO, gpus.logger.name)

    def say(member: Member, fetch_rate: float | None) -> list[str]:
        caplog.clear()
        gpus.say(member, fetch_rate)
        return caplog.messages

    return say


def test_one_line_while_the_kind_is_not_verified(said, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = said(FIRST, 400e9)
    assert "not been verified on NVIDIA H200" in line and "bench.gpu.verify" in line
    assert said(Member(1), 400e9) == said(Member(0, 1, 2), None) == []
    monkeypatch.setattr(gpus, "VERIFIED", ("NVIDIA H200",))
    assert said(FIRST, 400e9) == []


def test_links_that_are_slower_than_they_should_be(said, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = said(Member(1), 64e9)
    assert "64 GB/s" in line and "450" in line and "nvidia-smi topo -m" in line
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert said(Member(1), 1e9) == []

"""bench.gpu.verify without a GPU: what it would do, that one check stops no other, and the checks
themselves, small, over the fake driver."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import check_cas, check_kernels, check_memory, check_overlap, check_pool, verify
from bench.gpu.models import DECODERS
from bench.gpu.ranks import Rank, run_ranks
from tests.support.fake_gpu import FakeGpu


def test_a_dry_run_lists_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(check.name in printed and check.about in printed for check in verify.CHECKS)
    assert verify.main(["--dry-run", "--only", "cas"]) == 0
    assert "graphs" not in capsys.readouterr().out


def test_a_dry_run_needs_neither_sglang_nor_what_comes_with_it() -> None:
    program = (
        "import sys; from bench.gpu import verify; verify.main(['--dry-run']); "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert {"torch", "triton"} <= loaded
    assert not loaded & {"sglang", "zmq", "orjson", "msgspec", "transformers", "psutil", "fastapi"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--output", str(tmp_path / "out.json")]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_the_limits_fit_one_session_with_a_gpu() -> None:
    assert verify.TOTAL_SECONDS < 8 * 60
    assert all(check.seconds < verify.TOTAL_SECONDS / 2 for check in verify.CHECKS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_check_that_fails_is_a_result() -> None:
    result = verify.run_check(verify.CHECKS[0], 60.0)
    assert result["ok"] is False and "NVIDIA" in result["error"]


def test_a_check_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_run", hang)
    started = time.monotonic()
    result = verify.run_check(verify.CHECKS[0], 1.0)
    assert result["ok"] is False and "not done within 1 s" in result["error"]
    assert time.monotonic() - started < 30


def hang(check: verify.Check, results: Any) -> None:
    time.sleep(600)


def test_results_are_written_beside_the_machine_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {"cas": {"ok": True, "rows_sent": 3}, "engine": {"ok": None, "skipped": "no sglang"}}
    failed = {"ok": False, "error": "it hangs", "trace": "long"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        verify, "run_check", lambda check, seconds: {**ends.get(check.name, failed), "seconds": 1.0}
    )
    output = tmp_path / "new" / "out.json"
    assert verify.main(["--output", str(output)]) == 1
    content = json.loads(output.read_text())
    assert set(content["results"]) == {check.name for check in verify.CHECKS}
    assert content["software"]["torch"] and content["software"]["triton"]
    assert {"hardware", "command", "date"} <= set(content)
    printed = capsys.readouterr().out
    assert "skipped" in printed and "it hangs" in printed and "long" not in printed
    assert verify.main(["--output", str(output), "--only", "cas", "--only", "engine"]) == 0
    assert "nothing failed" in capsys.readouterr().out


def test_shared_memory_over_the_fake_driver() -> None:
    assert check_memory.shared(FakeGpu())["ok"]


class ProcessGpu(FakeGpu):
    in_processes = True


def test_ranks_are_processes_where_a_gpu_is() -> None:
    assert run_ranks(ProcessGpu(), 2, check_pool._eager, "ticketed") == [
        {"wrong": 0, "fetches": 8 * 4 + 3, "resyncs": 0, "skipped_turns": 0},
        {"wrong": 0, "fetches": 8 * 5 + 3, "resyncs": 0, "skipped_turns": 0},
    ]


def test_copy_rates_over_the_fake_driver() -> None:
    result = check_memory.copy_rates(FakeGpu())
    assert result["ok"] and result["wrong"] == []
    assert all(rate > 0 for rate in result["gigabytes_per_second"].values())


def test_kernel_costs_over_the_fake_driver() -> None:
    result = check_kernels.costs(FakeGpu())
    assert result["ok"] and result["microseconds"]["acquire and release"] > 0


def test_pool_over_the_fake_driver() -> None:
    result = check_pool.eager(FakeGpu())
    assert result["ok"]
    assert all(fetches > 0 for fetches in result["ticketed"]["fetches"])


def test_graphs_over_the_fake_driver() -> None:
    result = check_pool.graphs(FakeGpu())
    assert result["ok"]
    assert result["sequential"]["poison_is_seen"] == [True, True]


def test_cas_over_the_fake_driver() -> None:
    result = check_cas.correct(FakeGpu())
    assert result["ok"] and result["rows_sent"] > 0


def test_a_round_trip_over_the_fake_driver() -> None:
    gpu = FakeGpu()
    width, compute = check_cas._ffn(gpu)
    seconds, is_right = check_cas._remote(gpu, width, compute, torch.randn(3, width).bfloat16())
    assert is_right and seconds > 0


def test_overlap_over_the_fake_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_overlap, "BATCHES", (1, 4))
    result = check_overlap.measure(FakeGpu(), DECODERS[0])
    json.dumps(result)
    assert [point["batch"] for point in result["points"]] == [1, 4]


def test_a_rank_that_fails_fails_the_check() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 failed(.|\n)*no such thing"):
        run_ranks(FakeGpu(), 2, _fail, seconds=30.0)


def _fail(rank: Rank, gpu: FakeGpu) -> None:
    if rank.number == 1:
        raise ValueError("no such thing")

"""`sidp-sgl run-batch` on real engines: one job with bad requests, through a killed rank and a
Ctrl-C, ends with what plain SGLang says to each request (test_demo_model): the right sum."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from examples.demo_model.arithmetic import solve
from tests.support.jobs import records, write_lines
from tests.support.run_batch import (
    demo_lines,
    prompt_of,
    run_batch,
    text_of,
)
from tests.support.traces import Traces

NUM_SUMS = 150
BAD = {
    "too long": {"prompt": "1+" * 3000},
    "negative temperature": {"prompt": "1+1=", "temperature": -3},
    "no number": {"prompt": "1+1=", "max_tokens": "many"},
}


def bad_line(name: str) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": BAD[name]}


def test_a_job_through_a_killed_rank_and_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = Traces(monkeypatch, tmp_path / "traces")
    traces.folder.mkdir()
    sums = demo_lines(NUM_SUMS)
    two = {**sums[0]["body"], "n": 2}
    double = {**sums[0], "custom_id": "double", "body": two}
    write_lines(tmp_path / "in", [*map(bad_line, BAD), double, *sums])

    with run_batch(tmp_path, "--max-in-flight", "16") as first:
        first.wait_for_records(20)
        victim = first.rank_processes()[1]
        traces.processes()
        victim.kill()
        with run_batch(tmp_path) as second:  # meanwhile
            assert second.wait() == 2
        assert "written by another run-batch" in first.log.read_text()
        first.wait_for_records(first.num_records() + 20)
        traces.processes()
        os.kill(first.process.pid, signal.SIGINT)
        assert first.wait() == 130
    log = first.log.read_text()
    assert f"DP rank 1 (pid {victim.pid}) was killed by SIGKILL" in log
    assert "starting the engine again (1 of at most 3 times)" in log
    finished = (tmp_path / "out").read_bytes()
    assert 40 <= finished.count(b"\n") < NUM_SUMS

    with run_batch(tmp_path) as third:
        assert third.wait() == 0
    assert (tmp_path / "out").read_bytes().startswith(finished)  # nothing ran twice
    traces.assert_nothing_left(15.0)

    found = records(tmp_path / "out")
    by_id = {record["custom_id"]: record for record in found}
    assert len(by_id) == len(found) == len(BAD) + 1 + NUM_SUMS
    for name in BAD:
        response = by_id[name]["response"]
        assert response["status_code"] == 400
        assert response["body"]["error"]["type"] == "invalid_request_error"
    assert len(by_id["double"]["response"]["body"]["choices"]) == 2
    assert by_id["sum-0"]["response"]["body"]["model"] == "demo"
    texts = [text_of(by_id[line["custom_id"]]) for line in sums]
    assert texts == [solve(prompt_of(line)) for line in sums]
    last_line = third.log.read_text().splitlines()[-1]
    assert f"{len(found)} of {len(found)} requests done" in last_line
    assert "3 of them error records" in last_line and "WaS" in last_line


@pytest.mark.thorough
def test_a_job_goes_on_with_another_tp_size(tmp_path: Path) -> None:
    sums = demo_lines(NUM_SUMS)
    write_lines(tmp_path / "in", sums)
    with run_batch(tmp_path, "--max-in-flight", "16") as first:
        first.wait_for_records(20)
        os.kill(first.process.pid, signal.SIGINT)
        assert first.wait() == 130
    assert 20 <= len(records(tmp_path / "out")) < NUM_SUMS
    with run_batch(tmp_path, "--tp-size", "2") as second:
        assert second.wait() == 0
    texts = {record["custom_id"]: text_of(record) for record in records(tmp_path / "out")}
    assert [texts[line["custom_id"]] for line in sums] == [solve(prompt_of(line)) for line in sums]


def test_flags_of_sglang_are_checked_before_anything_starts(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", demo_lines(1))
    with run_batch(tmp_path, "--no-such-flag") as running:
        assert running.wait() == 2
    assert running.log.read_text() == (
        "sidp-sgl run-batch: error: unrecognized arguments: --no-such-flag\n"
    )
    assert not running.output.exists()

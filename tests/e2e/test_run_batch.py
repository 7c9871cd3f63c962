"""`sidp-sgl run-batch` on real engines: one job with bad requests, through one that ends the engine
and a Ctrl-C, ends with what plain SGLang says to each request (test_demo_model): the right sum."""

import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from examples.demo_model.arithmetic import solve
from tests.support.disturbances import POISONS, Disturbances, disturbed, poison
from tests.support.jobs import line, records, write_lines
from tests.support.run_batch import (
    demo_lines,
    prompt_of,
    run_batch,
    text_of,
)
from tests.support.traces import Traces

NUM_SUMS = 150
NUM_LONG = 1995
BAD = {
    "too long": {"prompt": "1+" * 3000},
    "negative temperature": {"prompt": "1+1=", "temperature": -3},
    "no number": {"prompt": "1+1=", "max_tokens": "many"},
}


def bad_line(name: str) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": BAD[name]}


@pytest.mark.timeout(1200)
def test_a_job_through_a_killed_rank_and_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = Traces(monkeypatch, tmp_path / "traces")
    traces.folder.mkdir()
    sums = demo_lines(NUM_SUMS)
    two = {**sums[0]["body"], "n": 2}
    double = {**sums[0], "custom_id": "double", "body": two}
    killer = line("killer", poison("rank"))
    write_lines(tmp_path / "in", [*map(bad_line, BAD), double, *sums[:20], killer, *sums[20:]])

    with (
        disturbed(Disturbances()),
        run_batch(tmp_path, "--max-in-flight", "16", "--max-restarts", "1") as first,
    ):
        first.wait_for_records(10)
        traces.processes()
        with run_batch(tmp_path) as second:  # meanwhile
            assert second.wait() == 2
        assert "written by another run-batch" in first.log.read_text()
        first.wait_for_log("starting the engine again (1 of at most 1 times)")
        os.kill(first.process.pid, signal.SIGINT)
        assert first.wait() == 130
    log = first.log.read_text()
    assert re.search(r"DP rank [01] \(pid \d+\) was killed by SIGKILL", log)
    assert "they run one by one" in log
    finished = (tmp_path / "out").read_bytes()
    assert 10 <= finished.count(b"\n") < NUM_SUMS

    with run_batch(tmp_path) as third:  # where the killer is a prompt like any other
        third.wait_for_records(NUM_SUMS)
        traces.processes()
        assert third.wait() == 0
    assert (tmp_path / "out").read_bytes().startswith(finished)  # nothing ran twice
    traces.assert_nothing_left(15.0)

    found = records(tmp_path / "out")
    by_id = {record["custom_id"]: record for record in found}
    assert len(by_id) == len(found) == len(BAD) + 2 + NUM_SUMS
    for name in BAD:
        response = by_id[name]["response"]
        assert response["status_code"] == 400
        assert response["body"]["error"]["type"] == "invalid_request_error"
    assert by_id["killer"]["response"]["status_code"] == 200
    assert len(by_id["double"]["response"]["body"]["choices"]) == 2
    assert by_id["sum-0"]["response"]["body"]["model"] == "demo"
    texts = [text_of(by_id[line["custom_id"]]) for line in sums]
    assert texts == [solve(prompt_of(line)) for line in sums]
    last_line = third.log.read_text().splitlines()[-1]
    assert f"{len(found)} of {len(found)} requests done" in last_line
    assert f"{len(BAD)} of them error records" in last_line and "WaS" in last_line


@pytest.mark.thorough
@pytest.mark.timeout(1800)  # eleven starts
def test_lines_that_end_the_engine_in_a_long_job(tmp_path: Path) -> None:
    """Five ways to end it, at random places: all other answers are those of an undisturbed run."""
    sums = demo_lines(NUM_LONG)
    for entry in sums:
        entry["body"]["max_tokens"] = 4
    lines = list(sums)
    for kind in POISONS:
        lines.insert(random.Random(kind).randrange(len(lines)), line(kind, poison(kind)))

    found = {}
    for name, content in (("undisturbed", sums), ("disturbed", lines)):
        folder = tmp_path / name
        folder.mkdir()
        write_lines(folder / "in", content)
        with disturbed(Disturbances()), run_batch(folder, "--max-in-flight", "64") as running:
            assert running.wait(1500.0) == 0, running.log.read_text()
        entries = records(folder / "out")
        found[name] = {entry["custom_id"]: entry for entry in entries}
        assert len(found[name]) == len(entries) == len(content)
    assert f"{len(POISONS)} of them error records" in running.log.read_text().splitlines()[-1]
    for kind in POISONS:
        response = found["disturbed"].pop(kind)["response"]
        assert response["status_code"] == 500
        assert "ended the engine" in response["body"]["error"]["message"]
    texts = {
        name: {custom_id: text_of(entry) for custom_id, entry in entries.items()}
        for name, entries in found.items()
    }
    assert texts["disturbed"] == texts["undisturbed"]


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


def test_a_flag_that_sglang_raises_at(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", demo_lines(1))
    with run_batch(tmp_path, "--log-level", "loud") as running:
        assert running.wait() == 2
    log = running.log.read_text()
    assert log.startswith("sidp-sgl run-batch: error: SGLang does not take these flags: ")
    assert "LOUD" in log and log.count("\n") == 1


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", demo_lines(1))
    with run_batch(tmp_path, "--model", str(tmp_path / "absent")) as running:
        assert running.wait() == 2
    log = running.log.read_text()
    assert log.startswith(
        f"sidp-sgl run-batch: error: --model-path {tmp_path}/absent can't be used"
    )
    assert log.count("\n") == 1
    assert not running.output.exists()

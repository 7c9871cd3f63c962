"""`sidp-sgl calibrate`: what two real ranks measure, and what is refused in one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sidp_sgl.cli import main
from sidp_sgl.errors import SidpError
from sidp_sgl.planner.calibrate import command as calibrate_command
from sidp_sgl.planner.calibrate.command import SMALL
from sidp_sgl.planner.calibrate.fit import fit_machine
from sidp_sgl.planner.calibrate.group import mean_points, measure_ranks
from sidp_sgl.planner.calibrate.points import (
    GemmPoint,
    Measurements,
    RankPoints,
    StepPoint,
    num_layers_of,
)
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import shape_from_config
from sidp_sgl.planner.weights import Split, block_bytes

SHAPE = replace(
    shape_from_config(SMALL, "small"), hidden_size=64, intermediate_size=512, vocab_size=256
)
BLOCK = block_bytes(SHAPE, 0, Split(), "ffn")
GBPS = 0.05  # a block takes 4 ms
STEPS = [StepPoint(layers, 1, 30, 0.001 + 0.001 * layers) for layers in (2, 8)]


def test_two_ranks_measure_a_paced_link_and_a_machine_follows() -> None:
    points = measure_ranks("cpu", SHAPE, 2, GBPS, point_seconds=0.002)
    assert all(point.seconds > 0 for point in points.gemms)
    widths = {point[1:3] for point in points.gemms}
    assert (64, 1024) in widths and (512, 64) in widths and (64, 256) in widths
    assert {point.rows for point in points.gemms} >= {1, 64, 128}
    for point in points.fetches:  # at the pace or a little slower
        assert point.seconds > 0.5 * point.num_bytes / (GBPS * 1e9)
    assert points.copy_rate > 2 * GBPS * 1e9, "at full speed it is faster"
    for overlap in points.overlaps:
        assert overlap.alone > 0 and overlap.beside > 0
        assert overlap.fetches > num_layers_of(2) // 2 * 0.5 * BLOCK / (GBPS * 1e9)
    assert [point.rows for point in points.calls] == [1, 4, 16]
    assert all(point.sent > 0 and point.local > 0 for point in points.calls)
    assert [point.rows for point in points.collectives] == [1, 16, 64]
    assert all(0 < point.seconds < 1 for point in points.collectives)
    machine = fit_machine(Measurements("two ranks", SHAPE, 2, 1 << 30, points, STEPS))
    assert machine.copy_seconds + BLOCK / machine.link_bandwidth > 0.5 * BLOCK / (GBPS * 1e9)
    assert machine.row_bandwidth == points.copy_rate


def test_a_rank_that_fails_says_why() -> None:
    shape = replace(SHAPE, num_kv_heads=3)  # queries that no keys fit
    with pytest.raises(SidpError, match="could not measure: "):
        measure_ranks("cpu", shape, 2, None, point_seconds=0.0005)


def test_points_of_ranks_are_averaged_but_for_what_they_are_of() -> None:
    ranks = [RankPoints([GemmPoint(4, 8, 16, s)], [], 10 * s, [], [], []) for s in (1.0, 2.0)]
    mean = mean_points(ranks)
    assert mean.gemms == [GemmPoint(4, 8, 16, 1.5)] and mean.copy_rate == 15.0


def test_the_file_has_the_machine_and_what_it_was_made_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine("m", 1 << 30, 1e10, 1e9, 1e11, 1e11, 1e9, 1e-6, 1e-5, 0, 0, 0, 1e-3)
    seen = []

    def calibrate(*given: object) -> dict[str, object]:
        seen.append(given)
        return {**machine.as_json(), "points": {}}

    monkeypatch.setattr(calibrate_command, "calibrate", calibrate)
    out = tmp_path / "mine.json"
    flags = ["--out", str(out), "--device", "cpu", "--num-ranks", "4", "--link-gbps", "0.5"]
    assert main(["calibrate", *flags]) == 0
    assert seen[0][2:] == (4, "cpu", 0.5)
    assert Machine.from_json(out) == machine and "points" in json.loads(out.read_text())
    assert "step_seconds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num-ranks", "1"], "--num-ranks 1"),
        (["--num-ranks", "many"], "--num-ranks"),
        (["--link-gbps", "0"], "--link-gbps"),
        (["--link-gbps", "nan"], "--link-gbps"),
        (["--out", "/no/such/folder/file"], "--out"),
        (["--model", "GPT-5"], "GPT-5"),
        (["--model", "Qwen3-30B-A3B"], "--model"),
        (["--device", "tpu"], "--device"),
        (["--unknown"], "--unknown"),
    ],
)
def test_mistakes_end_in_one_line(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error


def test_gpus_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sidp_sgl.planner.calibrate.command.num_gpus", lambda: 2)
    assert main(["calibrate", "--device", "cuda", "--num-ranks", "4"]) == 2
    assert "2 GPUs" in capsys.readouterr().err

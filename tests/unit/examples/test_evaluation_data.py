"""The committed problems of the evaluation's task are what its script makes."""

import json
from pathlib import Path

from examples.demo_model.arithmetic import is_held_out
from examples.evaluation.make_data import FOLDER, files


def test_committed_problems_are_the_scripts() -> None:
    for name, content in files().items():
        assert (FOLDER / name).read_text() == content


def test_test_problems_are_held_out_and_have_one_right_choice() -> None:
    for name, held_out in (("sums.test.jsonl", True), ("sums.fewshot.jsonl", False)):
        for line in Path(FOLDER, name).read_text().splitlines():
            row = json.loads(line)
            assert is_held_out(row["problem"]) == held_out
            assert row["choices"][row["right"]] == row["solution"]
            assert len(set(row["choices"])) == 4

"""lm-evaluation-harness on SiDP, by the command that docs/evaluation.md gives: plain's scores."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[2]
NUM_PROBLEMS = 24


class Evaluation(NamedTuple):
    """`scores`: task → score. `answers`: task → what was answered to each problem, in order."""

    scores: dict[str, float]
    answers: dict[str, list]
    log: str


def evaluate(checkpoint: str, folder: Path, model_args: str) -> Evaluation:
    command = [
        *(sys.executable, "-m", "examples.evaluation.on_cpu", "--model", "sglang"),
        *("--model_args", f"pretrained=examples/demo_model/{checkpoint},{model_args}"),
        *("--include_path", "examples/evaluation", "--tasks", "sums,sums_choice"),
        *("--batch_size", "auto", "--limit", str(NUM_PROBLEMS)),
        *("--output_path", str(folder), "--log_samples"),
    ]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONWARNINGS": "ignore",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hub"),
            "SIDP_CPU_DEVICE_MEMORY": "64MiB",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    (results,) = folder.glob("*/results_*.json")
    scores = {
        task: next(v for name, v in values.items() if re.match("(acc|exact_match),", name))
        for task, values in json.loads(results.read_text())["results"].items()
    }
    answers = {}
    for task in scores:
        (samples,) = folder.glob(f"*/samples_{task}_2*.jsonl")
        lines = sorted(map(json.loads, samples.open()), key=lambda line: line["doc_id"])
        answers[task] = [line["filtered_resps"] for line in lines]
    return Evaluation(scores, answers, ended.stderr)


@pytest.mark.parametrize(
    "checkpoint", ["checkpoint", pytest.param("moe", marks=pytest.mark.thorough)]
)
def test_scores_and_answers_equal_plain_sglang(checkpoint: str, tmp_path: Path) -> None:
    settings = {
        "plain": "dp_size=1,log_level=info",
        "sidp": "dp_size=2,sidp=True,log_level=info,decode_log_interval=10",
    }
    with ThreadPoolExecutor() as threads:  # they start for half a minute
        folders = map(tmp_path.joinpath, settings)
        plain, pooled = threads.map(partial(evaluate, checkpoint), folders, settings.values())
    assert plain.scores.keys() == {"sums", "sums_choice"}
    assert pooled.scores == plain.scores
    assert pooled.answers["sums"] == plain.answers["sums"]
    assert min(plain.scores.values()) >= 0.9 and len(plain.answers["sums"]) == NUM_PROBLEMS
    choices = zip(pooled.answers["sums_choice"], plain.answers["sums_choice"], strict=True)
    for ours, theirs in choices:  # of other batches, so sums may be rounded differently
        for (ours_logprob, ours_greedy), (logprob, greedy) in zip(ours, theirs, strict=True):
            assert float(ours_logprob) == pytest.approx(float(logprob), abs=0.1)
            assert ours_greedy == greedy
    assert "sidp:" not in plain.log
    fetched = [float(text) for text in re.findall(r"sidp: \w+, fetched ([\d.]+) MB", pooled.log)]
    assert sum(fetched) > 1.0


def test_benchmarks_that_parse_their_flags_first_know_those_of_sidp() -> None:
    command = [sys.executable, "-m", "sidp_sgl", "sglang.benchmark.offline_throughput", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "--sidp-pool" in ended.stdout and "--num-prompts" in ended.stdout

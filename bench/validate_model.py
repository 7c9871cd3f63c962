"""The planner's model against real engines: calibrated and measured in the same run.

For d ranks: a plain engine says how fast the link is to be (fetches of so many T(1)); `sidp-sgl
calibrate` measures the machine over that link, with layers of the model's shape but in other
depths, before the engines with SiDP and after them; then the step times, the threshold and the
throughput of a job, as measured of each engine, are compared with what both calibrations predict.
Nothing that is predicted has been measured on the engines that are compared.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.constant_batch import ENVIRONMENT, INPUT_TOKENS, KEYWORDS, run_batch, run_steps
from bench.demo_job import make_prompts
from bench.record import record
from bench.side import Side
from bench.simulator import Request
from bench.tables import plain
from bench.validation_predictions import Predictions
from bench.validation_table import BAND, Row, summary, table
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import ModelShape, load_model
from sidp_sgl.planner.weights import Split, block_bytes
from tests.support.checkpoints import write_checkpoint

LAYERS, HIDDEN, INTERMEDIATE = 16, 256, 1024
SIDES = ("plain", "was", "cas", "auto")
MANY_RANKS = 4  # from here on auto stands for both modes: engines take long to start
BATCHES = (1, 4, 16, 48)
STEPS = 28  # decode steps of a run
REPEATS = 2
FETCH_OVER_STEP = 3.0  # fetches of a step over the step of a plain rank at batch 1
JOB = (48, 32, 64)  # requests per rank, their input and output tokens
DEVICE_MEMORY = "256MB"
MiB = 1 << 20


def fetched_bytes(shape: ModelShape, num_ranks: int) -> int:
    """Of a rank in a WaS step."""
    fetched = shape.num_layers - shape.num_layers // num_ranks
    return fetched * block_bytes(shape, 0, Split(), "ffn")


def calibrate(model: Path, num_ranks: int, gbps: float, out: Path) -> dict[str, Any]:
    """By the command, in a process of its own, as a user would."""
    command = [sys.executable, "-m", "sidp_sgl.cli", "calibrate", "--device", "cpu"]
    command += ["--num-ranks", str(num_ranks), "--link-gbps", f"{gbps:.4f}", "--model", str(model)]
    environment = {**os.environ, "SIDP_CPU_DEVICE_MEMORY": DEVICE_MEMORY}
    subprocess.run(
        [*command, "--out", str(out)], env=environment, check=True, stdout=sys.stderr, timeout=600
    )
    return json.loads(out.read_text())


class Validation:
    """One number of ranks."""

    def __init__(self, model: Path, num_ranks: int, args: argparse.Namespace) -> None:
        self.model, self.num_ranks, self.args = model, num_ranks, args
        self.shape = load_model(str(model))
        single = {"was", "cas"} if num_ranks >= MANY_RANKS else set()
        self.names = [name for name in args.sides if name not in single]
        self.rows: list[Row] = []
        self.gbps = self.drift = 0.0
        self.thresholds: dict[str, Any] = {}

    def run(self, folder: Path) -> dict[str, Any]:
        """One engine at a time: none takes memory or cores from another, or from calibrating."""
        measured: dict[str, dict[str, Any]] = {}
        with self._side("plain", {}) as side:
            step = min(self._step(side, 1) for _ in range(3))
            measured["plain"] = self._measure("plain", side)
        self.gbps = fetched_bytes(self.shape, self.num_ranks) / (FETCH_OVER_STEP * step) / 1e9
        files = [folder / f"{when}-{self.num_ranks}.json" for when in ("before", "after")]
        calibrations = [calibrate(self.model, self.num_ranks, self.gbps, files[0])]
        for name in self.names[1:]:
            more = {"sidp": True, "sidp_mode": name, "sidp_residency": "off"}
            more["sidp_link_gbps"] = self.gbps
            with self._side(name, more) as side:
                measured[name] = self._measure(name, side)
        calibrations.append(calibrate(self.model, self.num_ranks, self.gbps, files[1]))
        machines = [Machine.from_json(file) for file in files]
        self._compare(Predictions(self.shape, machines, self.num_ranks), measured)
        return {
            "ranks": self.num_ranks,
            "link_gbps": self.gbps,
            "drift": self.drift,
            "machines": [calibration["machine"] for calibration in calibrations],
            "points": [calibration["points"] for calibration in calibrations],
            "thresholds": self.thresholds,
            "rows": [
                {**dataclasses.asdict(row), "error": row.error, "agrees": row.agrees}
                for row in self.rows
            ],
        }

    def _side(self, name: str, more: dict[str, Any]) -> Side:
        print(f"{self.num_ranks} ranks: {name}", file=sys.stderr)
        keywords = {
            "model_path": str(self.model),
            "dp_size": self.num_ranks,
            "skip_tokenizer_init": True,
            **KEYWORDS,
            **more,
        }
        environment = {**ENVIRONMENT, "SIDP_CPU_DEVICE_MEMORY": DEVICE_MEMORY}
        return Side(name, environment, keywords)

    def _step(self, side: Side, batch: int) -> float:
        return run_steps(side, batch, STEPS, list(range(self.num_ranks)), self.args.seed).seconds

    def _measure(self, name: str, side: Side) -> dict[str, Any]:
        """Seconds of a step by batch, and tokens per second of the job; medians of repeats."""
        ranks, seed = list(range(self.num_ranks)), self.args.seed
        if name == "auto":  # before it has learnt
            run_batch(side, 1, 6, ranks, seed)
            self.thresholds["at_start"] = _thresholds(side)
        steps = {}
        for batch in self.args.batches:
            # Uncounted: auto learns, the others get warm.
            run_batch(side, batch, 48 if name == "auto" else 8, ranks, seed)
            steps[batch] = statistics.median(self._step(side, batch) for _ in range(REPEATS))
        per_rank, input_len, output_len = JOB
        prompts = make_prompts(per_rank * self.num_ranks, input_len, seed)
        sampling = {"temperature": 0, "max_new_tokens": output_len, "ignore_eos": True}
        job = [
            side.run(prompts, sampling, ranks=ranks * per_rank).tokens_per_second
            for _ in range(REPEATS)
        ]
        if name == "auto":
            self.thresholds["learnt"] = _thresholds(side)
        return {"steps": steps, "tokens_per_second": statistics.median(job)}

    def _compare(self, predictions: Predictions, measured: dict[str, dict[str, Any]]) -> None:
        context = INPUT_TOKENS + STEPS / 2
        self.drift = predictions.drift(tuple(self.args.batches), context)
        for batch in self.args.batches:
            for name, seen in measured.items():
                said = predictions.step_seconds(name, batch, context)
                self._add("step, ms", name, batch, 1e3 * said, 1e3 * seen["steps"][batch])
        per_rank, input_len, output_len = JOB
        requests = [
            Request(number, 0.0, input_len, output_len, max_new_tokens=output_len)
            for number in range(per_rank * self.num_ranks)
        ]
        for name, seen in measured.items():
            said = predictions.tokens_per_second(name, requests)
            self._add("job, tokens/s", name, None, said, seen["tokens_per_second"])
        if "auto" in measured:
            said = predictions.threshold(context)
            fetch_ms = 1e3 * predictions.fetch_seconds()
            self.thresholds |= {"predicted": said, "fetch_ms": fetch_ms}
            learnt = statistics.fmean(self.thresholds["learnt"])
            self._add("threshold", "auto", None, said, learnt)

    def _add(self, what: str, side: str, batch: int | None, said: float, seen: float) -> None:
        row = Row(self.num_ranks, what, side, batch, said, seen)
        self.rows.append(row)
        print(f"  {what} {side} {batch or ''}: {said:.1f} for {seen:.1f}", file=sys.stderr)


def _thresholds(side: Side) -> list[int]:
    """Of every rank."""
    return [state["sidp"]["batch_threshold"] for state in side.states()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="D")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), metavar="B")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--quick", action="store_true", help="two ranks, plain DP and WaS only")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.quick:
        args.ranks, args.sides = [2], ["plain", "was"]
    args.sides = [name for name in SIDES if name in args.sides or name == "plain"]
    groups: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(
            Path(folder) / "model",
            "qwen3",
            num_layers=LAYERS,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            dtype=torch.bfloat16,
            max_shard_bytes=64 * MiB,
        )
        for num_ranks in args.ranks:
            groups.append(Validation(model, num_ranks, args).run(Path(folder)))
    is_complete = tuple(args.sides) == SIDES and args.ranks == [2, 4]
    name = "validate_model" if is_complete else "validate_model_quick"
    results = {"arguments": vars(args), "band": BAND, "groups": groups}
    record(name, results)
    print(plain(*table(results)))
    print(summary(results))


if __name__ == "__main__":
    main()

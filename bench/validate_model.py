"""The planner's model against real engines: calibrated and measured in the same run.

For d ranks: a plain engine says how fast the link is to be (fetches of so many T(1)); `sidp-sgl
calibrate` measures the machine over that link, with layers of the model's shape but in other
depths; then the step times, the threshold and the throughput of a job are predicted for each
engine and measured. Nothing that is predicted has been measured on the engines that are compared.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.constant_batch import ENVIRONMENT, INPUT_TOKENS, KEYWORDS, run_batch, run_steps
from bench.demo_job import make_prompts
from bench.record import record
from bench.side import Side
from bench.tables import markdown, plain, put_into
from sidp_sgl.planner.deployment import REPLICAS, SIDP, Deployment, Node
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import ModelShape, load_model
from sidp_sgl.planner.simulator import Request, Settings, simulate
from sidp_sgl.planner.time_model import Work
from sidp_sgl.planner.weights import Split, block_bytes
from sidp_sgl.weightpool.staging import ROWS_PER_RANK
from tests.support.checkpoints import write_checkpoint

LAYERS, HIDDEN, INTERMEDIATE = 16, 256, 1024
SIDES = ("plain", "was", "cas", "auto")
BATCHES = (1, 4, 16, 48)
STEPS = 28  # decode steps of a run
REPEATS = 2
FETCH_OVER_STEP = 3.0  # fetches of a step over the step of a plain rank at batch 1
JOB = (48, 32, 64)  # requests per rank, their input and output tokens
BAND = 0.2  # relative error
DEVICE_MEMORY = "256MB"
MiB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Row:
    """One prediction; step times in milliseconds, throughput in tokens per second."""

    ranks: int
    what: str
    side: str
    batch: int | None
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def agrees(self) -> bool:
        return abs(self.error) <= BAND


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


def deployment(shape: ModelShape, machine: Machine, num_ranks: int, side: str) -> Deployment:
    node = Node(shape, machine, num_ranks)
    if side == "plain":
        return Deployment(node, REPLICAS, 1, num_ranks)
    return Deployment(node, SIDP, 1, num_ranks, side)


class Validation:
    """One number of ranks."""

    def __init__(self, model: Path, num_ranks: int, args: argparse.Namespace) -> None:
        self.model, self.num_ranks, self.args = model, num_ranks, args
        self.shape = load_model(str(model))
        self.sides: dict[str, Side] = {}
        self.rows: list[Row] = []

    def run(self, folder: Path) -> dict[str, Any]:
        with ExitStack() as stack:
            first = self._start(stack, "plain", {})
            step = min(self._step(first, 1) for _ in range(3))
            gbps = fetched_bytes(self.shape, self.num_ranks) / (FETCH_OVER_STEP * step) / 1e9
            file = folder / f"calibration-{self.num_ranks}.json"
            calibration = calibrate(self.model, self.num_ranks, gbps, file)
            machine = Machine.from_json(file)
            for name in self.args.sides[1:]:
                more = {"sidp": True, "sidp_mode": name, "sidp_link_gbps": gbps}
                if name == "auto":
                    more["sidp_calibration"] = str(file)
                self._start(stack, name, more)
            thresholds = self._thresholds_at_start() if "auto" in self.sides else {}
            self._compare_steps(machine)
            self._compare_jobs(machine)
            if "auto" in self.sides:
                thresholds |= self._compare_threshold(machine)
        return {
            "ranks": self.num_ranks,
            "link_gbps": gbps,
            "machine": calibration["machine"],
            "points": calibration["points"],
            "thresholds": thresholds,
            "rows": [
                {**dataclasses.asdict(row), "error": row.error, "agrees": row.agrees}
                for row in self.rows
            ],
        }

    def _start(self, stack: ExitStack, name: str, more: dict[str, Any]) -> Side:
        print(f"{self.num_ranks} ranks: starting {name}", file=sys.stderr)
        keywords = {
            "model_path": str(self.model),
            "dp_size": self.num_ranks,
            "skip_tokenizer_init": True,
            **KEYWORDS,
            **more,
        }
        environment = {**ENVIRONMENT, "SIDP_CPU_DEVICE_MEMORY": DEVICE_MEMORY}
        self.sides[name] = stack.enter_context(Side(name, environment, keywords))
        return self.sides[name]

    def _step(self, side: Side, batch: int) -> float:
        return run_steps(side, batch, STEPS, list(range(self.num_ranks)), self.args.seed).seconds

    def _thresholds_at_start(self) -> dict[str, Any]:
        """What the ranks of auto take from the file, before they have learnt."""
        run_batch(self.sides["auto"], 1, 6, list(range(self.num_ranks)), self.args.seed)
        states = self.sides["auto"].states()
        return {"at_start": [state["sidp"]["batch_threshold"] for state in states]}

    def _compare_steps(self, machine: Machine) -> None:
        context = INPUT_TOKENS + STEPS / 2
        threshold = deployment(self.shape, machine, self.num_ranks, "auto").group.threshold(
            context, ROWS_PER_RANK
        )
        for batch in self.args.batches:
            for name, side in self.sides.items():
                if name == "auto":  # it learns: also from what the runs before were
                    run_batch(side, batch, 48, list(range(self.num_ranks)), self.args.seed)
                measured = statistics.median(self._step(side, batch) for _ in range(REPEATS))
                predicted = deployment(self.shape, machine, self.num_ranks, name).decode_seconds(
                    batch, context, threshold
                )
                self._add("step, ms", name, batch, 1e3 * predicted, 1e3 * measured)

    def _compare_jobs(self, machine: Machine) -> None:
        per_rank, input_len, output_len = JOB
        count = per_rank * self.num_ranks
        requests = [
            Request(n, 0.0, input_len, output_len, max_new_tokens=output_len) for n in range(count)
        ]
        prompts = make_prompts(count, input_len, self.args.seed)
        sampling = {"temperature": 0, "max_new_tokens": output_len, "ignore_eos": True}
        placed = [n % self.num_ranks for n in range(count)]
        for name, side in self.sides.items():
            measured = [
                side.run(prompts, sampling, ranks=placed).tokens_per_second for _ in range(REPEATS)
            ]
            report = simulate(
                deployment(self.shape, machine, self.num_ranks, name),
                requests,
                settings=Settings(ignore_eos=True),
            )
            predicted = report.tokens_per_second
            self._add("job, tokens/s", name, None, predicted, statistics.median(measured))

    def _compare_threshold(self, machine: Machine) -> dict[str, Any]:
        """The model's own against what the engine has learnt by now."""
        states = self.sides["auto"].states()
        learnt = [state["sidp"]["batch_threshold"] for state in states]
        group = deployment(self.shape, machine, self.num_ranks, "auto").group
        predicted = group.threshold(INPUT_TOKENS + STEPS / 2, ROWS_PER_RANK)
        self._add("threshold", "auto", None, predicted, statistics.fmean(learnt))
        plain_steps = {r.batch: r.measured for r in self.rows if r.side == "plain" and r.batch}
        return {
            "learnt": learnt,
            "predicted": predicted,
            "fetch_ms": 1e3 * group.fetch_seconds,
            "plain_steps_ms": plain_steps,
            "compute_ms": {
                batch: 1e3 * group.rank.compute_seconds(Work.decode(batch, INPUT_TOKENS))
                for batch in self.args.batches
            },
        }

    def _add(self, what: str, side: str, batch: int | None, said: float, seen: float) -> None:
        row = Row(self.num_ranks, what, side, batch, said, seen)
        self.rows.append(row)
        print(f"  {what} {side} {batch or ''}: {said:.1f} for {seen:.1f}", file=sys.stderr)


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    heads = ["d", "what", "engine", "batch", "predicted", "measured", "error", "in the band"]
    names = {"plain": "plain DP", "was": "WaS", "cas": "CaS", "auto": "auto"}
    cells = [
        [
            str(row.ranks),
            row.what,
            names[row.side],
            str(row.batch or ""),
            f"{row.predicted:,.1f}",
            f"{row.measured:,.1f}",
            f"{row.error:+.0%}",
            "yes" if row.agrees else "no",
        ]
        for row in rows
    ]
    return heads, cells


def summary(rows: list[Row]) -> str:
    inside = sum(row.agrees for row in rows)
    errors = sorted(abs(row.error) for row in rows)
    return (
        f"{inside} of {len(rows)} within {BAND:.0%}; median error {statistics.median(errors):.0%}, "
        f"largest {errors[-1]:.0%}."
    )


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
    results: list[dict[str, Any]] = []
    rows: list[Row] = []
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
            validation = Validation(model, num_ranks, args)
            results.append(validation.run(Path(folder)))
            rows += validation.rows
    is_complete = tuple(args.sides) == SIDES and args.ranks == [2, 4]
    name = "validate_model" if is_complete else "validate_model_quick"
    record(name, {"arguments": vars(args), "band": BAND, "groups": results})
    print(plain(*table(rows)))
    print(summary(rows))
    if is_complete:
        put_into("planner.md", "validated", f"{markdown(*table(rows))}\n\n{summary(rows)}")


if __name__ == "__main__":
    main()

"""Two dispatch methods of one SiDP engine each, on the same job: round robin, and `sidp`."""

import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from bench.demo_job import CHECKPOINT
from bench.offline import JobResult
from bench.record import over, spread
from bench.side import Side
from bench.tables import Table, ranged

METHODS = ("round_robin", "sidp")
HEADS = [
    "dispatch",
    "KV tokens",
    "hit rate",
    "idle",
    "tokens/s",
    "makespan (s)",
    "over round robin",
]


def compare(
    prompts: Sequence[Any],
    sampling: Any,
    *,
    dp_size: int,
    device_memory: str,
    repeats: int,
) -> dict[str, Any]:
    """Method → figures of its repeats, alternating; both engines are up at once."""
    runs: dict[str, list[JobResult]] = {method: [] for method in METHODS}
    with ExitStack() as stack:
        sides = {
            method: stack.enter_context(
                Side(
                    method,
                    {"SIDP_CPU_DEVICE_MEMORY": device_memory},
                    {
                        "model_path": str(CHECKPOINT),
                        "dp_size": dp_size,
                        "skip_tokenizer_init": True,
                        "sidp": True,
                        "load_balance_method": method,
                    },
                )
            )
            for method in METHODS
        }
        warm_up = sampling if isinstance(sampling, dict) else sampling[: 4 * dp_size]
        for side in sides.values():
            side.run(prompts[: 4 * dp_size], warm_up)
        for repeat in range(repeats):
            for method, side in sides.items():
                result = side.run(prompts, sampling)
                runs[method].append(result)
                print(f"{repeat + 1}/{repeats} {method}: {result.seconds:.1f} s", file=sys.stderr)
        states = {method: side.states()[0] for method, side in sides.items()}
    outputs = {method: results[0].outputs for method, results in runs.items()}
    assert outputs["sidp"] == outputs["round_robin"], "the same texts, whoever computes them"
    dispatched = states["sidp"]["sidp"]["dispatch"]
    assert dispatched["method"] == "sidp" and dispatched["sent"] >= repeats * len(prompts)
    return {
        "dispatch": dispatched,
        "methods": {method: figures(method, runs, states) for method in METHODS},
    }


def figures(
    method: str, runs: dict[str, list[JobResult]], states: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    results = runs[method]
    speeds = {name: [result.tokens_per_second for result in each] for name, each in runs.items()}
    return {
        "kv_tokens": states[method]["memory_usage"]["token_capacity"],
        "hit_rate": spread([result.hit_rate for result in results]),
        "idle_share": spread([result.idle_share for result in results]),
        "tokens_per_second": spread(speeds[method]),
        "seconds": spread([result.seconds for result in results]),
        "mean_batch": statistics.median(result.mean_batch for result in results),
        "over_round_robin": over(speeds[method], speeds["round_robin"]),
    }


def table(results: dict[str, Any]) -> Table:
    rows = [
        [
            method,
            f"{row['kv_tokens']:,}",
            f"{row['hit_rate']['median']:.1%}",
            f"{row['idle_share']['median']:.1%}",
            f"{row['tokens_per_second']['median']:.0f}",
            f"{row['seconds']['median']:.1f}",
            ranged(row["over_round_robin"]),
        ]
        for method, row in results["methods"].items()
    ]
    return HEADS, rows

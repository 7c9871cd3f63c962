"""How cost grows, by the simulator: ranks of a group, then groups behind a dispatcher.

Weak scaling: every GPU adds the same number of requests. One job is there from the start (its
tail shows), one comes as a Poisson process at a rate that both settings can serve (its imbalance
shows); between the groups the dispatcher goes in turn or takes the least loaded.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from bench.record import record
from bench.simulator import Job, Lengths, Report, Settings, make_requests, simulate
from bench.tables import Table, plain
from sidp_sgl.planner.deployment import REPLICAS, SIDP, Deployment, Node
from sidp_sgl.planner.gpus import find_gpu
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import load_model

MODEL, GPU = "Qwen3-32B", "H20"
GROUP = 8  # GPUs of a node
NUM_GPUS = (64, 512, 4096)
METHODS = ("round_robin", "total_tokens")
PROMPTS = Lengths("log-normal", 256, 0.5, 1024)
OUTPUTS = Lengths("log-normal", 128, 0.7, 512)
GROUP_PROMPTS = Lengths("log-normal", 1024, 0.5, 4096)
GROUP_OUTPUTS = Lengths("log-normal", 1024, 0.5, 4096)
LOAD = 0.8  # of the throughput at once of the slower setting
HEADS_GROUPS = ["d", "setting", "KV tokens per rank", "mean batch", "tokens/s per GPU", "idle"]
HEADS_GPUS = [
    "GPUs",
    "arrivals",
    "setting",
    "dispatcher",
    "requests",
    "tokens/s per GPU",
    "idle",
    "busiest rank over mean",
    "p50 (s)",
    "p99 (s)",
    "simulated in (s)",
]


def deployment(num_ranks: int, kind: str) -> Deployment:
    node = Node(load_model(MODEL), Machine.from_gpu(find_gpu(GPU)), num_ranks)
    return Deployment(node, kind, 1, num_ranks, "auto" if kind == SIDP else "")


def label(kind: str) -> str:
    return "SiDP auto" if kind == SIDP else "plain DP"


def of_groups(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One group of 2, 4 and 8 ranks."""
    rows = []
    for ranks in (2, 4, 8):
        job = Job(args.group_requests * ranks, GROUP_PROMPTS, GROUP_OUTPUTS)
        requests = make_requests(job, args.seed)
        for kind in (REPLICAS, SIDP):
            report = simulate(deployment(ranks, kind), requests, seed=args.seed)
            rows.append(
                {
                    "ranks": ranks,
                    "setting": label(kind),
                    "kv_tokens": report.ranks[0].kv_capacity,
                    "mean_batch": report.mean_batch,
                    "tokens_per_second_per_gpu": report.tokens_per_second / ranks,
                    "idle_share": report.idle_share,
                    "was_share": report.was_share,
                    "makespan": report.makespan,
                }
            )
    return rows


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def run(args: argparse.Namespace, gpus: int, kind: str, method: str, rate: float | None) -> Report:
    per_gpu = args.requests if rate is None else args.poisson_requests
    requests = make_requests(Job(per_gpu * gpus, PROMPTS, OUTPUTS, rate), args.seed)
    # Within a group SGLang's own default, in turn.
    settings = Settings(group_balance_method=method)
    return simulate(deployment(GROUP, kind), requests, gpus // GROUP, settings, args.seed)


def of_gpus(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for gpus in args.num_gpus:
        rates = []
        for kind in (REPLICAS, SIDP):
            rows.append(gpu_row(args, gpus, kind, METHODS[0], None))
            rates.append(LOAD * rows[-1]["requests"] / rows[-1]["makespan"])
        for kind in (REPLICAS, SIDP):
            rows += [gpu_row(args, gpus, kind, method, min(rates)) for method in METHODS]
    return rows


def gpu_row(
    args: argparse.Namespace, gpus: int, kind: str, method: str, rate: float | None
) -> dict[str, Any]:
    started = time.perf_counter()
    report = run(args, gpus, kind, method, rate)
    seconds = time.perf_counter() - started
    print(f"{gpus} GPUs, {label(kind)}, {method}: {seconds:.0f} s", file=sys.stderr)
    busy = [rank.busy_seconds for rank in report.ranks]
    latencies = [r.finish - r.arrival for r in report.requests]
    return {
        "gpus": gpus,
        "arrivals": "at once" if rate is None else "Poisson",
        "rate": rate,
        "setting": label(kind),
        "dispatcher": method,
        "requests": len(report.requests),
        "tokens_per_second_per_gpu": report.tokens_per_second / gpus,
        "idle_share": report.idle_share,
        "busiest_over_mean": max(busy) * len(busy) / sum(busy),
        "p50": percentile(latencies, 0.5),
        "p99": percentile(latencies, 0.99),
        "makespan": report.makespan,
        "was_share": report.was_share,
        "wall_seconds": seconds,
    }


def group_table(results: dict[str, Any]) -> Table:
    rows = [
        [
            str(row["ranks"]),
            row["setting"],
            f"{row['kv_tokens']:,}",
            f"{row['mean_batch']:.0f}",
            f"{row['tokens_per_second_per_gpu']:.0f}",
            f"{row['idle_share']:.1%}",
        ]
        for row in results["groups"]
    ]
    return HEADS_GROUPS, rows


def gpu_table(results: dict[str, Any]) -> Table:
    rows = [
        [
            f"{row['gpus']:,}",
            row["arrivals"],
            row["setting"],
            row["dispatcher"],
            f"{row['requests']:,}",
            f"{row['tokens_per_second_per_gpu']:.0f}",
            f"{row['idle_share']:.1%}",
            f"{row['busiest_over_mean']:.2f}",
            f"{row['p50']:.1f}",
            f"{row['p99']:.1f}",
            f"{row['wall_seconds']:.1f}",
        ]
        for row in results["gpus"]
    ]
    return HEADS_GPUS, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-gpus", type=int, nargs="+", default=list(NUM_GPUS))
    parser.add_argument("--requests", type=int, default=32, help="per GPU, at once")
    parser.add_argument("--poisson-requests", type=int, default=16, help="per GPU")
    parser.add_argument("--group-requests", type=int, default=600, help="per rank of one group")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = {
        "arguments": vars(args),
        "model": MODEL,
        "gpu": GPU,
        "load": LOAD,
        "repeats": 1,
        "groups": of_groups(args),
        "gpus": of_gpus(args),
    }
    record("scale" if args.num_gpus == list(NUM_GPUS) else "scale_quick", results)
    print(plain(*group_table(results)))
    print(plain(*gpu_table(results)))


if __name__ == "__main__":
    main()

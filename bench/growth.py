"""How cost grows with the ranks of a group, on engines: d = 2, 4, 8 on the cores that there are.

Plain DP and SiDP are up at once; all ranks decode the same batch. A small batch is below the given
threshold (CaS), a large one above it (WaS). The link is not paced and KV is plentiful: what SiDP
takes here beyond plain DP is its overhead.
"""

import argparse
import time
from contextlib import ExitStack
from typing import Any

from bench.constant_batch import ENVIRONMENT, KEYWORDS, run_steps
from bench.demo_job import CHECKPOINT
from bench.record import over, record, spread
from bench.side import Side
from bench.tables import Table, plain, ranged

BATCHES = {"cas": 2, "was": 16}  # of every rank
THRESHOLD = 8
IDLE_SECONDS = 3.0
HEADS = [
    "d",
    "start plain DP (s)",
    "start SiDP (s)",
    "CaS step over plain",
    "WaS step over plain",
    "messages/s per rank, CaS",
    "in WaS",
    "idle",
]


def started(stack: ExitStack, name: str, dp_size: int, **keywords: Any) -> tuple[Side, float]:
    """An engine, and the seconds from its process's start until it takes requests."""
    begun = time.perf_counter()
    common = {"model_path": str(CHECKPOINT), "skip_tokenizer_init": True, **KEYWORDS}
    environment = {**ENVIRONMENT, "SIDP_CPU_DEVICE_MEMORY": "64MB"}
    side = Side(name, environment, {**common, "dp_size": dp_size, **keywords})
    return stack.enter_context(side), time.perf_counter() - begun


def messages(side: Side) -> int:
    """Control messages that all ranks have sent so far."""
    return sum(state["sidp"]["cas"]["sent_messages"] for state in side.states())


def measure(dp_size: int, args: argparse.Namespace) -> dict[str, Any]:
    ranks = list(range(dp_size))
    with ExitStack() as stack:
        plain_dp, plain_seconds = started(stack, "plain DP", dp_size)
        sidp, sidp_seconds = started(
            stack, "SiDP", dp_size, sidp=True, sidp_residency="off", sidp_batch_threshold=THRESHOLD
        )
        found: dict[str, Any] = {
            "dp_size": dp_size,
            "start_seconds": {"plain": plain_seconds, "sidp": sidp_seconds},
        }
        for mode, batch in BATCHES.items():
            found[mode] = at_batch(plain_dp, sidp, mode, batch, ranks, args)
        before, begun = messages(sidp), time.perf_counter()
        time.sleep(IDLE_SECONDS)
        after = messages(sidp)
        found["idle_messages_per_second"] = (after - before) / (time.perf_counter() - begun)
        return found


def at_batch(
    plain_dp: Side, sidp: Side, mode: str, batch: int, ranks: list[int], args: argparse.Namespace
) -> dict[str, Any]:
    """Alternating repeats; times of a step in milliseconds, messages per second and rank."""
    times: dict[str, list[float]] = {"plain": [], "sidp": []}
    rates, shares = [], []
    for repeat in range(args.repeats + 1):
        plain_steps = run_steps(plain_dp, batch, args.steps, ranks, args.seed + repeat)
        before, begun = messages(sidp), time.perf_counter()
        steps = run_steps(sidp, batch, args.steps, ranks, args.seed + repeat)
        seconds = time.perf_counter() - begun
        if repeat == 0:
            continue  # warm-up
        times["plain"].append(plain_steps.seconds * 1e3)
        times["sidp"].append(steps.seconds * 1e3)
        rates.append((messages(sidp) - before) / seconds / len(ranks))
        shares.append(steps.cas_share)
    assert min(shares) > 0.5 if mode == "cas" else max(shares) == 0, (mode, shares)
    return {
        "batch": batch,
        "step_ms": {name: spread(values) for name, values in times.items()},
        "over_plain": over(times["sidp"], times["plain"]),
        "messages_per_second_per_rank": spread(rates),
        "cas_share": spread(shares),
    }


def table(results: dict[str, Any]) -> Table:
    rows = [
        [
            str(row["dp_size"]),
            *(f"{row['start_seconds'][side]:.0f}" for side in ("plain", "sidp")),
            *(ranged(row[mode]["over_plain"]) for mode in BATCHES),
            *(f"{row[mode]['messages_per_second_per_rank']['median']:.0f}" for mode in BATCHES),
            f"{row['idle_messages_per_second']:.0f}",
        ]
        for row in results["rows"]
    ]
    return HEADS, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dp-sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [measure(dp_size, args) for dp_size in args.dp_sizes]
    name = "growth" if args.dp_sizes == [2, 4, 8] else "growth_quick"
    results = {"arguments": vars(args), "threshold": THRESHOLD, "rows": rows}
    record(name, results)
    print(plain(*table(results)))


if __name__ == "__main__":
    main()

"""What docs/benchmarks.md says of each bench: a sentence or two, and a table of its results."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench import dispatch_overhead, growth, methods, peers
from bench.figures import LABELS
from bench.prefetch_order import order_name

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Section:
    """`name`: of the bench, its results and its figure."""

    name: str
    title: str
    about: str
    table: Callable[[dict[str, Any]], Table]
    figure: bool = False


def ranged(values: dict[str, Any], decimals: int = 2) -> str:
    """Median (minimum to maximum)."""
    middle, low, high = (f"{values[key]:.{decimals}f}" for key in ("median", "min", "max"))
    return f"{middle} ({low} to {high})"


def was_throughput(results: dict[str, Any]) -> Table:
    heads = ["KV cache", "device memory", "KV tokens per rank", "mean batch", "tokens/s", "ratio"]
    rows = []
    for name in ("short", "plentiful"):
        result, sides = results[name], ("plain DP", "SiDP")
        speeds = (statistics.median(result["tokens_per_second"][side]) for side in sides)
        ratios = result["ratios"]
        rows.append(
            [
                name,
                result["device_memory"],
                " → ".join(f"{result['kv_tokens'][side]:,}" for side in sides),
                " → ".join(f"{result['mean_batch'][side]:.1f}" for side in sides),
                " → ".join(f"{speed:,.0f}" for speed in speeds),
                f"{result['median_ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            ]
        )
    return heads, rows


def iteration_time(results: dict[str, Any]) -> Table:
    sides = list(results["rows"][0]["step_ms"])
    heads = ["batch per rank", *(f"{LABELS[side]} (ms)" for side in sides), "auto over the better"]
    rows = [
        [
            str(row["batch"]),
            *(f"{row['step_ms'][side]['median']:.1f}" for side in sides),
            ranged(row["auto_over_better"]),
        ]
        for row in results["rows"]
    ]
    return heads, rows


def tail(results: dict[str, Any]) -> Table:
    heads = ["", "KV tokens per rank", "mean batch", "tokens/s", "over plain DP", "steps in WaS"]
    rows = [
        [
            LABELS[side] if side != "was" else "WaS only",
            f"{results['kv_tokens'][side]:,}",
            f"{row['mean_batch']:.1f}",
            ranged(row["tokens_per_second"], 0),
            ranged(row["over_plain"]) if "over_plain" in row else "",
            f"{row['was_share']:.0%}" if "was_share" in row else "",
        ]
        for side, row in results["sides"].items()
    ]
    return heads, rows


def owner_share(results: dict[str, Any]) -> Table:
    heads = ["the other rank", "own step (ms)", "over idle"]
    rows = [
        [
            situation.removeprefix("other rank "),
            ranged(times, 1),
            ranged(results["over_idle"][situation]) if situation in results["over_idle"] else "",
        ]
        for situation, times in results["own_step_ms"].items()
    ]
    return heads, rows


PARTS = ("write rows", "wake owner", "compute", "wake requester", "read result", "round trip")


def round_trip(results: dict[str, Any]) -> Table:
    heads = ["situation", "rows", *(f"{part} (µs)" for part in PARTS), "computed here (µs)"]
    rows = [
        [row["situation"], str(row["rows"])]
        + [f"{row[part]['p50']:.0f}" for part in (*PARTS, "computed here")]
        for row in results["microseconds"]
    ]
    return heads, rows


def prefetch_order(results: dict[str, Any]) -> Table:
    heads = ["d", "f/τ", "jitter", "order", "slots", "measured", "event model"]
    rows = [
        [
            str(row["num_ranks"]),
            f"{row['fetch']:g}",
            f"{row['jitter']:.0%}",
            order_name(row),
            str(row["num_slots"]),
            ranged(row["measured"]),
            f"{row['model']['with_noise']:.2f}",
        ]
        for row in results["rows"]
        if row["placement"] == "interleaved" and row["num_slots"] > 1
    ]
    return heads, rows


def grown(results: dict[str, Any]) -> Table:
    return growth.HEADS, [growth.cells(row) for row in results["rows"]]


def dispatched(results: dict[str, Any]) -> Table:
    return methods.HEADS, [methods.cells(name, row) for name, row in results["methods"].items()]


def overhead(results: dict[str, Any]) -> Table:
    rows = [dispatch_overhead.cells(row) for row in results["microseconds"]]
    return dispatch_overhead.HEADS, rows


def peer_sides(results: dict[str, Any]) -> Table:
    ranks = {name: keywords["dp_size"] for name, keywords in results["keywords"].items()}
    return peers.HEADS, [peers.cells(n, row, ranks[n]) for n, row in results["sides"].items()]


SECTIONS = (
    Section(
        "was_throughput",
        "Throughput against plain DP",
        "The demo model on four ranks, WaS only. Where plain DP is short of KV, SiDP runs larger "
        "batches; where KV is plentiful there is nothing to win and the cost shows.",
        was_throughput,
    ),
    Section(
        "tail",
        "The tail of a job",
        "Long-tailed output lengths, four ranks, fetches of a step take four steps at batch 1. The "
        "paper has 1.07 to 1.09 with WaS only and 1.27 to 1.32 with both.",
        tail,
        figure=True,
    ),
    Section(
        "iteration_time",
        "A decode step over the batch",
        "Two ranks; the fetches of a step take five times a step at batch 1. The paper's Fig. 11.",
        iteration_time,
        figure=True,
    ),
    Section(
        "prefetch_order",
        "Order of the fetches",
        "Step time over the ideal; f: time of a fetch, τ: compute of a layer. The paper's order is "
        "`shifted` with d − 1 slots.",
        prefetch_order,
    ),
    Section(
        "round_trip",
        "Round trip of a remote unit",
        "CaS: one FFN of the demo model, owner and requester in processes of their own.",
        round_trip,
    ),
    Section(
        "owner_share",
        "What serving costs an owner",
        "Its own step at batch 16, while the other rank is idle, streams from it, or sends it "
        "rows.",
        owner_share,
    ),
    Section(
        "growth",
        "How cost grows with the ranks",
        "Plain DP and SiDP up at once, all ranks on the same cores, link not paced, KV plentiful: "
        "what SiDP takes beyond plain DP is its overhead.",
        grown,
    ),
    Section(
        "prefix_dispatch",
        "Dispatch: prompts that share headers",
        "A few-shot evaluation: eight headers, 2,000 prompts in random order, four ranks whose KV "
        "cache does not hold all headers. SiDP on both sides.",
        dispatched,
    ),
    Section(
        "makespan",
        "Dispatch: long-tailed outputs",
        "Idle: share of the ranks' time without a request, to the end of the job.",
        dispatched,
    ),
    Section(
        "dispatch_overhead",
        "Dispatch: the policy's own time",
        "Per request, while 100,000 are queued; eight ranks.",
        overhead,
    ),
    Section(
        "peers",
        "Beside what SGLang itself offers",
        "One model of real sizes with random weights, all GPUs, the same share of their memory and "
        "the same job for every side. SGLang 0.5.23 has `sharded_gpu` for DeepSeek only.",
        peer_sides,
    ),
)

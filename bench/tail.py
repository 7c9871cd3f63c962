"""A job with long-tailed output lengths on plain DP, WaS only and auto, at the same device memory.

Most requests are short, a few are long: the job ends with small batches on few ranks, where the
fetches of a step take several times its compute. The link is paced so that they take four times
the step of one plain rank alone at batch 1, for WaS and auto alike. All sides are up at once:
about 20 GB of memory, five minutes on two cores.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from bench.constant_batch import ENVIRONMENT, KEYWORDS, run_steps
from bench.demo_job import CHECKPOINT, fetched_bytes, link_gbps, make_prompts
from bench.figures import COLOURS, LABELS, figure
from bench.offline import JobResult
from bench.record import record, spread
from bench.side import Side

SIDES = ["plain", "was", "auto"]
FETCH_OVER_STEP = 4.0  # of one plain rank alone at batch 1
STATUS_SECONDS = 0.25  # between two looks at the ranks' counters
BUCKETS = 20  # of a job's time
REPEATS = 3


def output_lengths(args: argparse.Namespace) -> list[int]:
    """Log-normal, clipped."""
    lengths = np.random.default_rng(args.seed).lognormal(
        np.log(args.median_tokens), args.sigma, args.requests
    )
    return np.clip(np.rint(lengths), 4, args.max_tokens).astype(int).tolist()


def keywords(side: str, gbps: float | None, dp_size: int) -> dict[str, Any]:
    common = {
        "model_path": str(CHECKPOINT),
        "dp_size": dp_size,
        "skip_tokenizer_init": True,
        **KEYWORDS,
    }
    if side == "plain":
        return common
    return {**common, "sidp": True, "sidp_mode": side, "sidp_link_gbps": gbps}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Side → its runs, KV tokens per rank, and the link that WaS and auto had."""
    environment = {**ENVIRONMENT, "SIDP_CPU_DEVICE_MEMORY": args.device_memory}
    prompts = make_prompts(args.requests, args.input_tokens, args.seed)
    sampling = [
        {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
        for length in output_lengths(args)
    ]
    gbps, first_step = args.link_gbps, None
    sides: dict[str, Side] = {}
    runs: dict[str, list[JobResult]] = {name: [] for name in SIDES}
    with ExitStack() as stack:
        for name in SIDES:  # one after another: auto calibrates on a quiet machine
            print(f"starting {LABELS[name]}", file=sys.stderr)
            side = Side(LABELS[name], environment, keywords(name, gbps, args.dp_size))
            sides[name] = stack.enter_context(side)
            if name == "plain":
                # The fastest: a step that was disturbed would make the link too slow.
                first_step = min(run_steps(side, 1, 48, [0], args.seed).seconds for _ in range(6))
                gbps = gbps or link_gbps(args.dp_size, FETCH_OVER_STEP * first_step)
            side.run(prompts[: 4 * args.dp_size], {**sampling[0], "max_new_tokens": 24})  # warm-up
        for repeat in range(args.repeats):
            for name, side in sides.items():
                result = side.run(prompts, sampling, status_seconds=STATUS_SECONDS)
                runs[name].append(result)
                print(
                    f"{repeat + 1}/{args.repeats} {side.name}: {result.seconds:.1f} s, "
                    f"{result.tokens_per_second:.0f} tokens/s",
                    file=sys.stderr,
                )
        kv = {n: s.states()[0]["memory_usage"]["token_capacity"] for n, s in sides.items()}
    return {"link_gbps": gbps, "first_step_seconds": first_step, "kv_tokens": kv, "runs": runs}


def steps_until(result: JobResult, mode: str, moments: Sequence[float]) -> np.ndarray:
    """Steps of all ranks in `mode` from the first sample to each of `moments`, interpolated."""
    times = [when for when, _ in result.statuses]
    counts = [sum(s["iterations"][mode] for s in statuses) for _, statuses in result.statuses]
    return np.interp(moments, times, counts) - counts[0]


def over_time(result: JobResult, has_modes: bool) -> dict[str, list[float | None]]:
    """Mean batch per rank and share of CaS steps in equal parts of the job's time."""
    edges = np.linspace(0.0, result.seconds, BUCKETS + 1)
    times, batches = zip(*result.batches, strict=True)
    bucket = np.clip(np.digitize(times, edges) - 1, 0, BUCKETS - 1)
    means = [
        float(np.mean(np.asarray(batches)[bucket == n])) if (bucket == n).any() else None
        for n in range(BUCKETS)
    ]
    if not has_modes:
        return {"batch": means}
    was, cas = (np.diff(steps_until(result, mode, edges)) for mode in ("was", "cas"))
    shares = [float(c / (c + w)) if c + w > 0 else None for w, c in zip(was, cas, strict=True)]
    return {"batch": means, "cas_share": shares}


def side_row(name: str, runs: dict[str, list[JobResult]]) -> dict[str, Any]:
    results = runs[name]
    has_modes = name != "plain"
    row: dict[str, Any] = {
        "tokens_per_second": spread([result.tokens_per_second for result in results]),
        "seconds": spread([result.seconds for result in results]),
        "mean_batch": statistics.median(result.mean_batch for result in results),
        "over_time": [over_time(result, has_modes) for result in results],
    }
    if has_modes:
        pairs = zip(results, runs["plain"], strict=True)
        row["over_plain"] = spread([a.tokens_per_second / b.tokens_per_second for a, b in pairs])
        steps = [
            [float(steps_until(result, mode, [float("inf")])[0]) for mode in ("was", "cas")]
            for result in results
        ]
        row["was_share"] = statistics.median(was / max(1.0, was + cas) for was, cas in steps)
    if name == "auto":
        pairs = zip(results, runs["was"], strict=True)
        row["over_was"] = spread([a.tokens_per_second / b.tokens_per_second for a, b in pairs])
        last = results[-1].statuses[-1][1]
        row["thresholds"] = [status["batch_threshold"] for status in last]
    return row


def print_table(rows: dict[str, dict[str, Any]], kv: dict[str, int]) -> None:
    def text(values: dict[str, Any] | None, decimals: int) -> str:
        if values is None:
            return ""
        low, high = (f"{values[end]:.{decimals}f}" for end in ("min", "max"))
        return f"{values['median']:.{decimals}f} ({low}–{high})"

    print(f"{'':>8} {'KV tokens':>9} {'mean batch':>10} {'seconds':>7} {'tokens/s':>16}", end=" ")
    print(f"{'over plain DP':>18} {'over WaS':>18}  steps in WaS")
    for name, row in rows.items():
        print(
            f"{LABELS[name]:>8} {kv[name]:>9,} {row['mean_batch']:>10.1f} "
            f"{row['seconds']['median']:>7.1f} {text(row['tokens_per_second'], 0):>16} "
            f"{text(row.get('over_plain'), 2):>18} {text(row.get('over_was'), 2):>18}",
            f" {row['was_share']:.0%}" if "was_share" in row else "",
        )
    print(
        "The paper (DP8): WaS 1.07–1.09, both 1.27–1.32 over plain DP; over 90 % of steps in WaS."
    )


def middle(row: dict[str, Any], key: str) -> list[float]:
    """Median of the repeats in every part of the job's time; nan where nothing ran."""
    columns = zip(*(repeat[key] for repeat in row["over_time"]), strict=True)
    known = [[value for value in column if value is not None] for column in columns]
    return [statistics.median(values) if values else float("nan") for values in known]


def draw(name: str, rows: dict[str, dict[str, Any]]) -> None:
    with figure(name, 3, 12, 3.6) as (speed, batch, modes):
        for index, (side, row) in enumerate(rows.items()):
            values, seconds = row["tokens_per_second"], row["seconds"]["median"]
            middle_value = values["median"]
            error = [[middle_value - values["min"]], [values["max"] - middle_value]]
            speed.bar(index, middle_value, yerr=error, color=COLOURS[side], capsize=4)
            when = (np.arange(BUCKETS) + 0.5) * seconds / BUCKETS
            batch.plot(when, middle(row, "batch"), color=COLOURS[side], label=LABELS[side])
        speed.set_xticks(range(len(rows)), [LABELS[side] for side in rows])
        speed.set_ylabel("tokens per second")
        batch.set_xlabel("time (s)")
        batch.set_ylabel("running requests per rank")
        batch.legend(frameon=False)
        shares = 100 * np.asarray(middle(rows["auto"], "cas_share"))
        width = rows["auto"]["seconds"]["median"] / BUCKETS
        starts = np.arange(BUCKETS) * width
        modes.bar(starts, shares, width, align="edge", color=COLOURS["cas"], label="CaS")
        modes.bar(
            starts, 100 - shares, width, shares, align="edge", color=COLOURS["was"], label="WaS"
        )
        modes.set_xlabel("time of the job with auto (s)")
        modes.set_ylabel("steps of all ranks (%)")
        modes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dp-size", type=int, default=4)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--input-tokens", type=int, default=32)
    parser.add_argument("--median-tokens", type=float, default=24.0, help="of the output lengths")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the lengths' logarithm")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--link-gbps", type=float, help="default: from the step at batch 1")
    parser.add_argument("--device-memory", default="7.9MB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    result = measure(args)
    runs = result.pop("runs")
    rows = {name: side_row(name, runs) for name in SIDES}
    lengths = output_lengths(args)
    name = "tail" if args.repeats >= REPEATS else "tail_quick"
    record(name, {"arguments": vars(args), **result, "output_lengths": lengths, "sides": rows})
    draw(name, rows)
    fetch = fetched_bytes(args.dp_size) / result["link_gbps"] / 1e6
    print(f"Outputs of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all.", end=" ")
    print(f"The fetches of a step take {fetch:.1f} ms ({result['link_gbps']:.3f} GB/s per link).")
    print_table(rows, result["kv_tokens"])


if __name__ == "__main__":
    main()

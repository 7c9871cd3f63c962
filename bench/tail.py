"""A job with long-tailed output lengths on plain DP, WaS only, WaS and CaS, and auto, whose blocks
stay where KV memory is spare, at the same device memory.

Most requests are short, a few are long: the job ends with small batches on few ranks, where the
fetches of a step take several times its compute. The link is paced so that they take four times
the step of one plain rank alone at batch 1, for WaS and auto alike.

Three engines are up at once: plain DP, SiDP with SGLang's dispatcher, which plain DP has, and SiDP
with its own. All modes are the same engine, whose batch threshold and residency are set before each
job.
With `--tp` all have that TP size, and every TP rank's link carries its part of the bytes.
About 20 GB of memory, ten minutes on two cores.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.constant_batch import ENVIRONMENT, KEYWORDS, run_steps
from bench.demo_job import CHECKPOINT, fetched_bytes, link_gbps, make_prompts
from bench.figures import COLOURS, LABELS, figure
from bench.offline import JobResult
from bench.record import over, record, spread
from bench.side import Side, rotated
from bench.tables import Table, plain, ranged


@dataclass(frozen=True)
class Run:
    """A job on one of the engines; `mode` is None in plain DP. `stays`: whether blocks may."""

    engine: str
    mode: str | None = None
    stays: bool = False

    @property
    def label(self) -> str:
        mode = "WaS and CaS" if self.mode == "auto" and not self.stays else None
        return " ".join(
            filter(None, [mode or LABELS[self.mode or "plain"], DISPATCHERS[self.engine]])
        )


DISPATCHERS = {"plain": "", "round_robin": "(SGLang's dispatcher)", "sidp": "(own dispatcher)"}
RUNS = {
    "plain": Run("plain"),
    "was_round_robin": Run("round_robin", "was"),
    "was": Run("sidp", "was"),
    "both_round_robin": Run("round_robin", "auto"),
    "both": Run("sidp", "auto"),
    "auto_round_robin": Run("round_robin", "auto", stays=True),
    "auto": Run("sidp", "auto", stays=True),
}
THRESHOLDS = {"was": 1, "auto": 0}  # 0: as the ranks measure it
FETCH_OVER_STEP = 4.0  # of one plain rank alone at batch 1
MODES = ("was", "cas", "local")
STATUS_SECONDS = 0.25  # between two looks at the ranks' counters
BUCKETS = 20  # of a job's time
REPEATS = 3
HEADS = [
    "",
    "KV tokens per rank",
    "mean batch",
    "seconds",
    "tokens/s",
    "over plain DP",
    "over SGLang's dispatcher",
    "over WaS",
    "steps WaS, CaS, local",
]


def output_lengths(args: argparse.Namespace) -> list[int]:
    """Log-normal, clipped."""
    lengths = np.random.default_rng(args.seed).lognormal(
        np.log(args.median_tokens), args.sigma, args.requests
    )
    return np.clip(np.rint(lengths), 4, args.max_tokens).astype(int).tolist()


def start(stack: ExitStack, engine: str, gbps: float | None, args: argparse.Namespace) -> Side:
    keywords: dict[str, Any] = {
        "model_path": str(CHECKPOINT),
        "dp_size": args.dp_size,
        "tp_size": args.tp,
        "skip_tokenizer_init": True,
        **KEYWORDS,
    }
    if engine != "plain":
        keywords |= {"sidp": True, "load_balance_method": engine, "sidp_link_gbps": gbps}
    environment = {**ENVIRONMENT, "SIDP_CPU_DEVICE_MEMORY": args.device_memory}
    print(f"starting {engine}", file=sys.stderr)
    return stack.enter_context(Side(engine, environment, keywords))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The results of every run, KV tokens per rank, and the link that SiDP had."""
    prompts = make_prompts(args.requests, args.input_tokens, args.seed)
    sampling = [
        {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
        for length in output_lengths(args)
    ]
    results: dict[str, list[JobResult]] = {name: [] for name in RUNS}
    with ExitStack() as stack:
        sides = {"plain": start(stack, "plain", None, args)}
        # The fastest: a step that was disturbed would make the link too slow.
        steps = [run_steps(sides["plain"], 1, 48, [0], args.seed) for _ in range(6)]
        first_step = min(step.seconds for step in steps)
        gbps = args.link_gbps or link_gbps(args.dp_size, FETCH_OVER_STEP * first_step) / args.tp
        for engine in ("round_robin", "sidp"):  # one after another: they calibrate
            sides[engine] = start(stack, engine, gbps, args)
        for side in sides.values():  # warm-up
            side.run(prompts[: 4 * args.dp_size], {**sampling[0], "max_new_tokens": 24})
        for repeat in range(args.repeats):
            for name in rotated(list(RUNS), repeat):
                run = RUNS[name]
                side = sides[run.engine]
                if run.mode:
                    side.update(
                        sidp_batch_threshold=THRESHOLDS[run.mode], sidp_residency=int(run.stays)
                    )
                result = side.run(prompts, sampling, status_seconds=STATUS_SECONDS)
                results[name].append(result)
                print(
                    f"{repeat + 1}/{args.repeats} {run.label}: {result.seconds:.1f} s, "
                    f"{result.tokens_per_second:.0f} tokens/s",
                    file=sys.stderr,
                )
        kv = {n: s.states()[0]["memory_usage"]["token_capacity"] for n, s in sides.items()}
    return {
        "link_gbps": gbps,
        "first_step_seconds": first_step,
        "kv_tokens": {name: kv[run.engine] for name, run in RUNS.items()},
        "runs": results,
    }


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
    steps = {mode: np.diff(steps_until(result, mode, edges)) for mode in MODES}
    total = sum(steps.values())
    shares = {
        f"{mode}_share": [
            float(n / all_n) if all_n > 0 else None for n, all_n in zip(of, total, strict=True)
        ]
        for mode, of in steps.items()
    }
    return {"batch": means, **shares}


def row_of(name: str, runs: dict[str, list[JobResult]]) -> dict[str, Any]:
    results, run = runs[name], RUNS[name]
    speeds = {each: [result.tokens_per_second for result in runs[each]] for each in runs}
    suffix = "" if run.engine == "sidp" else f"_{run.engine}"
    row: dict[str, Any] = {
        "tokens_per_second": spread(speeds[name]),
        "seconds": spread([result.seconds for result in results]),
        "mean_batch": statistics.median(result.mean_batch for result in results),
        "over_time": [over_time(result, run.mode is not None) for result in results],
    }
    if run.mode is not None:
        row["over_plain"] = over(speeds[name], speeds["plain"])
        steps = [
            [float(steps_until(result, mode, [float("inf")])[0]) for mode in MODES]
            for result in results
        ]
        row["shares"] = [
            statistics.median(counts[index] / max(1.0, sum(counts)) for counts in steps)
            for index in range(len(MODES))
        ]
    if run.engine == "sidp":
        row["over_round_robin"] = over(speeds[name], speeds[f"{name}_round_robin"])
    if run.mode == "auto":
        row["over_was"] = over(speeds[name], speeds[f"was{suffix}"])
        last = results[-1].statuses[-1][1]
        row["thresholds"] = [status["batch_threshold"] for status in last]
    return row


def table(results: dict[str, Any]) -> Table:
    rows = []
    for name, row in results["sides"].items():
        ratios = (row.get(key) for key in ("over_plain", "over_round_robin", "over_was"))
        rows.append(
            [
                RUNS[name].label,
                f"{results['kv_tokens'][name]:,}",
                f"{row['mean_batch']:.1f}",
                f"{row['seconds']['median']:.1f}",
                ranged(row["tokens_per_second"], 0),
                *(ranged(ratio) if ratio else "" for ratio in ratios),
                ", ".join(f"{share:.0%}" for share in row.get("shares", [])),
            ]
        )
    return HEADS, rows


def middle(row: dict[str, Any], key: str) -> list[float]:
    """Median of the repeats in every part of the job's time; nan where nothing ran."""
    columns = zip(*(repeat[key] for repeat in row["over_time"]), strict=True)
    known = [[value for value in column if value is not None] for column in columns]
    return [statistics.median(values) if values else float("nan") for values in known]


def draw(name: str, rows: dict[str, dict[str, Any]]) -> None:
    with figure(name, 3, 12, 3.6) as (speed, batch, modes):
        for index, (key, row) in enumerate(rows.items()):
            run = RUNS[key]
            colour = COLOURS[run.mode or "plain"]
            is_theirs = run.engine == "round_robin"
            values, seconds = row["tokens_per_second"], row["seconds"]["median"]
            middle_value = values["median"]
            error = [[middle_value - values["min"]], [values["max"] - middle_value]]
            speed.barh(
                -index,
                middle_value,
                xerr=error,
                color=colour,
                alpha=0.5 if is_theirs else 1,
                capsize=4,
            )
            when = (np.arange(BUCKETS) + 0.5) * seconds / BUCKETS
            if not is_theirs:
                batch.plot(when, middle(row, "batch"), color=colour, label=run.label)
        labels = [RUNS[key].label.replace(" (", "\n(") for key in rows]
        speed.set_yticks([-index for index in range(len(rows))], labels)
        speed.set_xlabel("tokens per second")
        batch.set_xlabel("time (s)")
        batch.set_ylabel("running requests per rank")
        batch.legend(frameon=False)
        width = rows["auto"]["seconds"]["median"] / BUCKETS
        starts, bottom = np.arange(BUCKETS) * width, np.zeros(BUCKETS)
        for mode in MODES:
            shares = 100 * np.nan_to_num(np.asarray(middle(rows["auto"], f"{mode}_share")))
            modes.bar(
                starts, shares, width, bottom, align="edge", color=COLOURS[mode], label=LABELS[mode]
            )
            bottom += shares
        modes.set_xlabel("time of the job with auto (s)")
        modes.set_ylabel("steps of all ranks (%)")
        modes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dp-size", type=int, default=4)
    parser.add_argument("--tp", type=int, default=1, help="TP size of every side")
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

    results = {"arguments": vars(args), **measure(args)}
    runs = results.pop("runs")
    lengths = output_lengths(args)
    results |= {
        "output_lengths": lengths,
        "sides": {name: row_of(name, runs) for name in RUNS},
    }
    name = "tail" if args.tp == 1 else f"tail_tp{args.tp}"
    name += "" if args.repeats >= REPEATS else "_quick"
    record(name, results)
    draw(name, results["sides"])
    fetch = fetched_bytes(args.dp_size) / args.tp / results["link_gbps"] / 1e6
    print(f"Outputs of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all.", end=" ")
    print(f"The fetches of a step take {fetch:.1f} ms ({results['link_gbps']:.3f} GB/s per link).")
    print(plain(*table(results)))


if __name__ == "__main__":
    main()

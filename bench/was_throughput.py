"""Tokens per second of SiDP (WaS) over plain DP at the same device memory, all sides in one run.

Two settings of the demo model on four CPU ranks: KV short (little device memory, as DP has on
GPUs whose weights fill them) and KV plentiful (nothing to gain: the honest overhead). SiDP runs
with SGLang's dispatcher, as plain DP does, which shows what pooling gives, and with its own, which
shows what dispatch adds. Three engines are up at once: 16 GB of memory.
"""

import argparse
import statistics
import sys
from contextlib import ExitStack
from typing import Any

from bench.demo_job import CHECKPOINT, make_prompts
from bench.offline import JobResult
from bench.record import over, record, spread
from bench.side import Side, rotated
from bench.tables import Table, plain, ranged

SETTINGS = {"short": "7.9MB", "plentiful": "256MB"}
DP_SIZE = 4
SIDP = {"sidp": True, "sidp_mode": "was"}
SIDES: dict[str, dict[str, Any]] = {
    "plain": {},
    "round_robin": {**SIDP, "load_balance_method": "round_robin"},  # what "auto" is in plain DP
    "sidp": SIDP,
}
HEADS = [
    "KV cache",
    "KV tokens per rank",
    "mean batch",
    "tokens/s: plain DP",
    "SiDP, SGLang's dispatcher",
    "SiDP, own dispatcher",
    "pooling gives",
    "dispatch adds",
    "both",
]


def measure(device_memory: str, args: argparse.Namespace) -> dict[str, Any]:
    common = {"model_path": str(CHECKPOINT), "dp_size": DP_SIZE, "skip_tokenizer_init": True}
    environment = {"SIDP_CPU_DEVICE_MEMORY": device_memory}
    prompts = make_prompts(args.requests, args.input_tokens, args.seed)
    sampling = {"temperature": 0, "max_new_tokens": args.output_tokens, "ignore_eos": True}
    runs: dict[str, list[JobResult]] = {name: [] for name in SIDES}
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(Side(name, environment, {**common, **keywords}))
            for name, keywords in SIDES.items()
        }
        for side in sides.values():
            side.run(prompts[: 4 * DP_SIZE], sampling)  # warm-up
        for repeat in range(args.repeats):
            for name in rotated(list(sides), repeat):
                result = sides[name].run(prompts, sampling)
                runs[name].append(result)
                print(
                    f"{device_memory} {repeat + 1}/{args.repeats} {name}: "
                    f"{result.tokens_per_second:.0f} tokens/s",
                    file=sys.stderr,
                )
        states = {name: side.states() for name, side in sides.items()}
    speeds = {name: [run.tokens_per_second for run in results] for name, results in runs.items()}
    sidp = [state["sidp"] for state in states["sidp"]]
    assert all(status["was"]["fetches"] > 0 for status in sidp)
    return {
        "device_memory": device_memory,
        "kv_tokens": {n: s[0]["memory_usage"]["token_capacity"] for n, s in states.items()},
        "tokens_per_second": {name: spread(values) for name, values in speeds.items()},
        "mean_batch": {
            name: statistics.median(run.mean_batch for run in results)
            for name, results in runs.items()
        },
        "pooling_gives": over(speeds["round_robin"], speeds["plain"]),
        "dispatch_adds": over(speeds["sidp"], speeds["round_robin"]),
        "both_give": over(speeds["sidp"], speeds["plain"]),
        "stall_seconds": sum(status["was"]["stall_seconds"] for status in sidp),
        "fetched_bytes": sum(status["was"]["bytes"] for status in sidp),
        "same_outputs": [
            all(result.outputs == of_a_repeat[0].outputs for result in of_a_repeat)
            for of_a_repeat in zip(*runs.values(), strict=True)
        ],
    }


def table(results: dict[str, Any]) -> Table:
    rows = [
        [
            f"{name} ({result['device_memory']})",
            " → ".join(f"{result['kv_tokens'][side]:,}" for side in ("plain", "sidp")),
            " → ".join(f"{batch:.1f}" for batch in result["mean_batch"].values()),
            *(ranged(speed, 0) for speed in result["tokens_per_second"].values()),
            *(ranged(result[what]) for what in ("pooling_gives", "dispatch_adds", "both_give")),
        ]
        for name, result in results["settings"].items()
    ]
    return HEADS, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settings = {name: measure(SETTINGS[name], args) for name in args.settings}
    results = {"arguments": vars(args), "dp_size": DP_SIZE, "settings": settings}
    name = "was_throughput" if args.settings == list(SETTINGS) else "was_throughput_quick"
    record(name, results)
    print(plain(*table(results)))


if __name__ == "__main__":
    main()

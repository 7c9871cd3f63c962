"""Tokens per second of SiDP (WaS) over plain DP at the same device memory, both sides in one run.

Two settings of the demo model on four CPU ranks: KV short (little device memory, as DP has on
GPUs whose weights fill them) and KV plentiful (nothing to gain: the honest overhead).
"""

import argparse
import statistics

from bench.demo_job import CHECKPOINT, make_prompts
from bench.record import record
from bench.side import Side

SETTINGS = {"short": "7.9MB", "plentiful": "256MB"}
DP_SIZE = 4


def measure(device_memory: str, args: argparse.Namespace) -> dict:
    common = {"model_path": str(CHECKPOINT), "dp_size": DP_SIZE, "skip_tokenizer_init": True}
    environment = {"SIDP_CPU_DEVICE_MEMORY": device_memory}
    prompts = make_prompts(args.requests, args.input_tokens, args.seed)
    sampling = {"temperature": 0, "max_new_tokens": args.output_tokens, "ignore_eos": True}
    with (
        Side("plain DP", environment, common) as plain,
        Side("SiDP", environment, {**common, "sidp": True, "sidp_mode": "was"}) as pooled,
    ):
        for side in (plain, pooled):
            side.run(prompts[: 4 * DP_SIZE], sampling)  # warm-up
        runs = [
            (plain.run(prompts, sampling), pooled.run(prompts, sampling))
            for _ in range(args.repeats)
        ]
        states = {side.name: side.states() for side in (plain, pooled)}
    ratios = [b.tokens_per_second / a.tokens_per_second for a, b in runs]
    sidp = [state["sidp"] for state in states["SiDP"]]
    assert all(status["was"]["fetches"] > 0 for status in sidp)
    return {
        "device_memory": device_memory,
        "kv_tokens": {n: s[0]["memory_usage"]["token_capacity"] for n, s in states.items()},
        "tokens_per_second": {
            name: [run[index].tokens_per_second for run in runs]
            for index, name in enumerate(("plain DP", "SiDP"))
        },
        "mean_batch": {
            name: statistics.median(run[index].mean_batch for run in runs)
            for index, name in enumerate(("plain DP", "SiDP"))
        },
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "stall_seconds": sum(status["was"]["stall_seconds"] for status in sidp),
        "fetched_bytes": sum(status["was"]["bytes"] for status in sidp),
        "same_outputs": [a.outputs == b.outputs for a, b in runs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = {name: measure(memory, args) for name, memory in SETTINGS.items()}
    record("was_throughput", {"arguments": vars(args), "dp_size": DP_SIZE, **results})
    print(f"{'KV':>10} {'tokens plain':>13} {'SiDP':>7} {'tok/s plain':>12} {'SiDP':>7}  ratio")
    for name, result in results.items():
        kv, speed = result["kv_tokens"], result["tokens_per_second"]
        print(
            f"{name:>10} {kv['plain DP']:>13,} {kv['SiDP']:>7,} "
            f"{statistics.median(speed['plain DP']):>12,.0f} "
            f"{statistics.median(speed['SiDP']):>7,.0f}  {result['median_ratio']:.2f} "
            f"({min(result['ratios']):.2f} to {max(result['ratios']):.2f})"
        )


if __name__ == "__main__":
    main()

"""Prompt tokens per second of a mixture whose experts fill the devices: plain DP, SiDP streaming
experts (WaS) and SiDP sending rows to them (CaS), all sides in one run; DWDP's own case.

Prompts are uneven and answers one token long, so every step is a prefill. Links are paced.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.offline import JobResult
from bench.record import over, record, spread
from bench.side import Side, rotated
from bench.tables import Table, plain, ranged
from tests.support.checkpoints import write_checkpoint

SIZES = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "head_dim": 64,
    "vocab_size": 512,
}
DEVICE_MEMORY = "68MB"
SIDES: dict[str, dict[str, Any]] = {
    "plain": {},
    "streaming": {"sidp": True, "sidp_mode": "was"},
    "sending": {"sidp": True, "sidp_mode": "cas"},
    "auto": {"sidp": True, "sidp_residency": "off"},
}
HEADS = [
    "ranks",
    "KV tokens per rank",
    "tokens/s: plain DP",
    *(f"{name} / plain" for name in list(SIDES)[1:]),
    "fetches hidden",
    "steps sent: sending, auto",
]


def make_prompts(count: int, longest: int, seed: int) -> list[list[int]]:
    """Of lognormal lengths, without a shared prefix."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(np.rint(generator.lognormal(np.log(96), 1.0, count)), 8, longest)
    return [generator.integers(4, 500, int(length)).tolist() for length in lengths]


def measure(checkpoint: Path, dp_size: int, args: argparse.Namespace) -> dict[str, Any]:
    common = {
        "model_path": str(checkpoint),
        "dp_size": dp_size,
        "skip_tokenizer_init": True,
        "chunked_prefill_size": args.chunk,
        "max_prefill_tokens": args.chunk,
        "load_balance_method": "round_robin",  # what "auto" is in plain DP
        "disable_radix_cache": True,
    }
    environment = {"SIDP_CPU_DEVICE_MEMORY": DEVICE_MEMORY, "OMP_NUM_THREADS": "1"}
    link = {"sidp_link_gbps": args.link_gbps}
    prompts = make_prompts(args.requests, args.longest, args.seed)
    sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    runs: dict[str, list[JobResult]] = {name: [] for name in SIDES}
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(
                Side(name, environment, {**common, **keywords, **(link if keywords else {})})
            )
            for name, keywords in SIDES.items()
        }
        for side in sides.values():
            side.run(prompts[: 4 * dp_size], sampling)  # warm-up
        before = {name: side.states() for name, side in sides.items()}
        for repeat in range(args.repeats):
            for name in rotated(list(sides), repeat):
                result = sides[name].run(prompts, sampling)
                runs[name].append(result)
                speed = result.prompt_tokens / result.seconds
                print(f"d {dp_size}, {repeat + 1}/{args.repeats} {name}: {speed:.0f} tokens/s",
                      file=sys.stderr)  # fmt: skip
        after = {name: side.states() for name, side in sides.items()}
    speeds = {n: [run.prompt_tokens / run.seconds for run in each] for n, each in runs.items()}

    def counted(name: str, *path: str) -> list[float]:
        """Of every rank, over all repeats."""
        found = []
        for old, new in zip(before[name], after[name], strict=True):
            first, last = old["sidp"], new["sidp"]
            for key in path:
                first, last = first[key], last[key]
            found.append(last - first)
        return found

    stalls, fetched = (counted("streaming", "was", of) for of in ("stall_seconds", "bytes"))
    for name in ("sending", "auto"):
        assert sum(counted(name, "cas", "rows_sent")) == sum(counted(name, "cas", "rows_served"))
    return {
        "dp_size": dp_size,
        "kv_tokens": {n: s[0]["memory_usage"]["token_capacity"] for n, s in after.items()},
        "rows_per_rank": after["sending"][0]["sidp"]["cas"]["rows_per_rank"],
        "tokens_per_second": {name: spread(values) for name, values in speeds.items()},
        "over_plain": {n: over(speeds[n], speeds["plain"]) for n in list(SIDES)[1:]},
        "hidden_share": 1 - sum(stalls) / (sum(fetched) / (args.link_gbps * 1e9)),
        "sent_share": {
            name: sum(counted(name, "iterations", "cas"))
            / (sum(counted(name, "iterations", "cas")) + sum(counted(name, "iterations", "was")))
            for name in ("sending", "auto")
        },
        "same_outputs": [
            all(result.outputs == repeat[0].outputs for result in repeat)
            for repeat in zip(*runs.values(), strict=True)
        ],
    }  # fmt: skip


def table(results: dict[str, Any]) -> Table:
    rows = [
        [
            str(each["dp_size"]),
            " → ".join(f"{each['kv_tokens'][side]:,}" for side in ("plain", "streaming")),
            ranged(each["tokens_per_second"]["plain"], 0),
            *(ranged(ratio) for ratio in each["over_plain"].values()),
            f"{each['hidden_share']:.0%}",
            ", ".join(f"{share:.0%}" for share in each["sent_share"].values()),
        ]
        for each in results["groups"]
    ]
    return HEADS, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dp-sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--longest", type=int, default=480)
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a prefill")
    parser.add_argument("--link-gbps", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        write_checkpoint(checkpoint, "qwen3_moe", num_layers=8, **SIZES)
        groups = [measure(checkpoint, dp_size, args) for dp_size in args.dp_sizes]
    results = {"arguments": vars(args), "device_memory": DEVICE_MEMORY, "groups": groups}
    name = "prefill" if args.dp_sizes == [2, 4] else "prefill_quick"
    record(name, results)
    print(plain(*table(results)))


if __name__ == "__main__":
    main()

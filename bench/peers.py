"""SiDP beside what SGLang itself offers a node: plain DP, TP, DP attention, sharded_gpu.

Every side has the same share of every GPU's memory and the same job. One side fills the GPUs, so
they run one after the other, and every round starts each of them anew. A peer that fails is a
result too (SGLang 0.5.23 has `sharded_gpu` for DeepSeek only); SiDP that fails is an error.
`--device cpu` tries the bench itself, with plain DP and SiDP.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu.random_checkpoint import write_in_child
from bench.record import over, record, spread
from bench.side import Side
from bench.tables import Table, plain, ranged
from sidp_sgl.planner.models import read_config

PLAIN = "plain DP"
START_SECONDS = 900.0
HEADS = ["side", "ranks", "KV tokens, all ranks", "tokens/s", "over plain DP"]
_FIRST_TOKEN = 1000  # ids below may have a meaning


def sides(device: str, num_gpus: int) -> dict[str, dict[str, Any]]:
    """Name → keywords of sgl.Engine; `dp_size` is that of the ranks which have requests."""
    replicas = {"dp_size": num_gpus}
    if device == "cpu":
        return {PLAIN: replicas, "SiDP": {**replicas, "sidp": True}}
    return {
        PLAIN: replicas,
        "TP": {"dp_size": 1, "tp_size": num_gpus},
        "DP attention": {**replicas, "tp_size": num_gpus, "enable_dp_attention": True},
        "sharded_gpu": {**replicas, "offload_mode": "sharded_gpu", "offload_group_size": 1},
        "SiDP": {**replicas, "sidp": True, "cuda_graph_backend_prefill": "disabled"},
    }


def memory_fraction(weight_bytes: int, device_bytes: int, kv_over_weights: float) -> float:
    """`--mem-fraction-static` with which a full replica has `kv_over_weights` of its weights' bytes
    left for KV; at most 0.85."""
    return min(0.85, (1 + kv_over_weights) * weight_bytes / device_bytes)


def job(args: argparse.Namespace, vocab_size: int) -> tuple[list[list[int]], dict[str, Any]]:
    """Prompts without a common prefix; all outputs are of one length."""
    shape = args.requests_per_gpu * args.num_gpus, args.input_tokens
    first = min(_FIRST_TOKEN, vocab_size // 2)
    prompts = np.random.default_rng(args.seed).integers(first, vocab_size, shape).tolist()
    return prompts, {"temperature": 0, "max_new_tokens": args.output_tokens, "ignore_eos": True}


def run_side(
    name: str, keywords: dict[str, Any], prompts: list[list[int]], sampling: dict[str, Any]
) -> dict[str, Any]:
    """Start, warm up, run the job; `error` instead of figures where SGLang fails."""
    try:
        with Side(name, {}, keywords, START_SECONDS) as side:
            side.run(prompts[: 4 * keywords["dp_size"]], {**sampling, "max_new_tokens": 16})
            result, states = side.run(prompts, sampling), side.states()
    except RuntimeError as error:
        return {"error": str(error)}
    ranks = [state["sidp"] for state in states if "sidp" in state]
    fetches = sum(rank["was"]["fetches"] for rank in ranks)
    assert not keywords.get("sidp") or fetches > 0, "SiDP fetched nothing"
    return {
        "tokens_per_second": result.tokens_per_second,
        "kv_tokens": sum(state["memory_usage"]["token_capacity"] for state in states),
        "mean_batch": result.mean_batch,
        "fetches": fetches,
    }


def row(name: str, rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Figures of one side over its rounds, or the error of the first that failed."""
    results = [each[name] for each in rounds]
    if errors := [result["error"] for result in results if "error" in result]:
        return {"error": errors[0]}
    found: dict[str, Any] = {
        "kv_tokens": results[0]["kv_tokens"],
        "mean_batch": spread([result["mean_batch"] for result in results]),
        "tokens_per_second": spread([result["tokens_per_second"] for result in results]),
        "fetches": sum(result["fetches"] for result in results),
    }
    if not any("error" in each[PLAIN] for each in rounds):
        speeds = ([each[side]["tokens_per_second"] for each in rounds] for side in (name, PLAIN))
        found["over_plain"] = over(*speeds)
    return found


def table(results: dict[str, Any]) -> Table:
    rows = []
    for name, found in results["sides"].items():
        row = [name, str(results["keywords"][name]["dp_size"])]
        if "error" in found:
            row += ["", "", f"failed: {found['error'][:60]}"]
        else:
            speed, ratio = found["tokens_per_second"]["median"], found.get("over_plain")
            row += [f"{found['kv_tokens']:,}", f"{speed:,.0f}", ranged(ratio) if ratio else ""]
        rows.append(row)
    return HEADS, rows


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config, model = read_config(args.model)
    print(f"writing a checkpoint of {model}'s sizes", file=sys.stderr)
    weight_bytes = write_in_child(folder, config, args.seed, args.device)
    device_bytes = args.device_bytes or torch.cuda.get_device_properties(0).total_memory
    common = {
        "model_path": str(folder),
        "device": args.device,
        "skip_tokenizer_init": True,
        "mem_fraction_static": memory_fraction(weight_bytes, device_bytes, args.kv_over_weights),
    }
    prompts, sampling = job(args, config["vocab_size"])
    compared = sides(args.device, args.num_gpus)
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(args.repeats):
        rounds.append({})
        for name, keywords in compared.items():
            rounds[-1][name] = run_side(name, {**common, **keywords}, prompts, sampling)
            print(f"{number + 1}/{args.repeats} {name}: {rounds[-1][name]}", file=sys.stderr)
    return {
        "model": model,
        "weight_bytes": weight_bytes,
        "mem_fraction_static": common["mem_fraction_static"],
        "keywords": compared,
        "rounds": rounds,
        "sides": {name: row(name, rounds) for name in compared},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen3-8B", help="built-in name or a config.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--num-gpus", type=int, help="default: all there are")
    parser.add_argument("--device-bytes", type=int, help="of one GPU; default: what it says")
    parser.add_argument("--kv-over-weights", type=float, default=0.8, help="bytes, in plain DP")
    parser.add_argument("--requests-per-gpu", type=int, default=256)
    parser.add_argument("--input-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.num_gpus = args.num_gpus or torch.cuda.device_count()
    if args.num_gpus < 2 or (args.device == "cpu" and not args.device_bytes):
        parser.error("two GPUs or more; with --device cpu give --num-gpus and --device-bytes")
    with tempfile.TemporaryDirectory(prefix="sidp-peers-") as folder:
        results = measure(args, Path(folder))
    name = "peers" if args.device == "cuda" and args.repeats >= 3 else "peers_quick"
    record(name, {"arguments": vars(args), **results})
    print(plain(*table(results)))
    if error := results["sides"]["SiDP"].get("error"):
        sys.exit(f"error: SiDP failed: {error}")


if __name__ == "__main__":
    main()

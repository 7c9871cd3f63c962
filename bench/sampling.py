"""The sampling part of a step with TP, from every rank's part of the logits to the token ids:
replicated, as SGLang does it, and sequence-parallel, in turn in one run; without an engine.

TP ranks are processes: on GPUs where there are enough of them, else on CPUs with a core each.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.record import over, record, spread
from bench.tables import Table, plain, ranged
from sidp_sgl.planner.gpus import find_gpu

WAYS = ("replicated", "sequence-parallel")
KINDS = ("greedy", "greedy, logprobs", "temperature", "temperature, top-p")
VOCAB = 151_936  # Qwen's
RATIO = "sequence-parallel / replicated"


@dataclass(frozen=True)
class Ranks:
    """TP ranks of one run."""

    tp_size: int
    device: str  # "cpu" or "cuda"
    threads: int
    vocab_size: int
    seed: int


def make_batch(kind: str, num_rows: int, vocab_size: int, device: str) -> Any:
    import torch

    from bench import sampler

    top_p = {"need_top_p_sampling": True, "top_ps": torch.full((num_rows,), 0.9, device=device)}
    return sampler.make_batch(
        num_rows,
        vocab_size,
        greedy=kind.startswith("greedy"),
        logprobs="logprobs" in kind,
        device=device,
        **(top_p if "top-p" in kind else {}),
    )


class Rank:
    """One process: its shard of the logits, sampled either way."""

    def __init__(self, ranks: Ranks, number: int, rendezvous: str) -> None:
        import torch
        import torch.distributed as dist
        from sglang.srt.layers import sampler as sglang_sampler

        from bench import sampler
        from sidp_sgl.sglang_hooks.sampling import hooks

        self.ranks, self.number, self._torch, self._dist = ranks, number, torch, dist
        self._sampler = sampler
        torch.manual_seed(ranks.seed + number)
        torch.set_num_threads(ranks.threads)
        self.device = "cpu"
        if ranks.device == "cuda":
            self.device = f"cuda:{number}"
            torch.cuda.set_device(number)
        dist.init_process_group(
            "nccl" if ranks.device == "cuda" else "gloo",
            init_method=f"file://{rendezvous}",
            rank=number,
            world_size=ranks.tp_size,
        )
        self.group = dist.group.WORLD
        parallel = SimpleNamespace(
            tp_rank=number,
            tp_size=ranks.tp_size,
            tp_group=SimpleNamespace(device_group=self.group),
        )
        hooks.get_parallel = lambda: parallel
        kernel = SimpleNamespace(sampling_backend="pytorch")
        sglang_sampler.get_exec = lambda: SimpleNamespace(kernel=kernel)
        self._sampling = hooks.SequenceParallelSampling()
        self._runner = sampler.make_runner(self._sampling.sync_token_ids)
        self._alone = sampler.make_runner()
        self.width = -(-ranks.vocab_size // (64 * ranks.tp_size)) * 64
        self._sampling.shard = hooks.Shard(self.width, ranks.vocab_size)

    def seconds(self, kind: str, num_rows: int, way: str) -> float:
        """That the slowest rank takes."""
        torch = self._torch
        shard = torch.randn(num_rows, self.width, device=self.device).bfloat16()
        batch = make_batch(kind, num_rows, self.ranks.vocab_size, self.device)
        self._wait()
        begun = time.perf_counter()
        if way == "replicated":
            self._replicated(shard, batch)
        else:
            output = self._sampler.output_of(shard)
            self._sampling.sample(self._sampler.sample, self._runner, output, batch)
        if self.ranks.device == "cuda":
            torch.cuda.synchronize()
        took = torch.tensor([time.perf_counter() - begun], device=self.device)
        self._dist.all_reduce(took, op=self._dist.ReduceOp.MAX)
        return took.item()

    def _replicated(self, shard: Any, batch: Any) -> None:
        """As SGLang's LogitsProcessor and ModelRunner do it."""
        torch, (num_rows, width) = self._torch, shard.shape
        parts = torch.empty(
            self.ranks.tp_size * num_rows, width, dtype=shard.dtype, device=self.device
        )
        self._dist.all_gather_single(parts, shard)
        rows = parts.view(-1, num_rows, width).transpose(0, 1).reshape(num_rows, -1)
        logits = rows[:, : self.ranks.vocab_size].float()
        self._sampler.sample(self._alone, self._sampler.output_of(logits), batch)

    def _wait(self) -> None:
        if self.ranks.device == "cuda":
            self._torch.cuda.synchronize()
        self._dist.barrier()


def run_rank(pipe: Connection, ranks: Ranks, number: int, rendezvous: str) -> None:
    """Measures what it is asked for, until None comes."""
    if ranks.device == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        first = number * ranks.threads
        own = [cores[(first + n) % len(cores)] for n in range(ranks.threads)]
        os.sched_setaffinity(0, set(own))
    import torch

    rank = Rank(ranks, number, rendezvous)
    with torch.inference_mode():
        while (request := pipe.recv()) is not None:
            pipe.send(rank.seconds(*request))
    rank._dist.destroy_process_group()


def measure(ranks: Ranks, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds by kind, batch and way; the ways in turn."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ranks.tp_size):
            pipe, far = context.Pipe()
            process = context.Process(
                target=run_rank, args=(far, ranks, number, str(Path(folder) / "meet")), daemon=True
            )
            process.start()
            far.close()
            pipes.append(pipe)
            processes.append(process)

        def ask(*request: Any) -> float:
            for pipe in pipes:
                pipe.send(request)
            return 1e3 * max(pipe.recv() for pipe in pipes)

        rows = []
        for kind in args.kinds:
            for batch in args.batches:
                times: dict[str, list[float]] = {way: [] for way in WAYS}
                for repeat in range(-1, args.repeats):  # the first warms up
                    for way in WAYS[:: 1 if repeat % 2 else -1]:
                        took = ask(kind, batch, way)
                        if repeat >= 0:
                            times[way].append(took)
                row = {way: spread(values) for way, values in times.items()}
                row[RATIO] = over(times[WAYS[1]], times[WAYS[0]])
                rows.append({"kind": kind, "batch": batch, **row})
                print(f"{kind}, batch {batch}", file=sys.stderr)
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(30)
            process.kill()
    return rows


# Bytes that a GPU's memory moves per logit (BF16 in, FP32 from the cast on), by what runs over it.
CAST, ARGMAX, SCALE, SOFTMAX, DRAW = 2 + 4, 4, 4 + 4, 4 + 4 + 4, 4 + 4
PASSES = {"greedy": CAST + ARGMAX, "temperature": CAST + SCALE + SOFTMAX + DRAW}
PAIR = 16  # bytes of a row's result


def modelled(kind: str, tp_size: int, vocab_size: int, batch: int, gpu_name: str) -> dict[str, Any]:
    """What peaks of link and memory allow: per rank, the bytes received, the milliseconds, and the
    bytes that logits take (BF16 and FP32)."""
    gpu = find_gpu(gpu_name)
    others = (tp_size - 1) / tp_size
    logits = batch * vocab_size
    shard = logits / tp_size
    results = PAIR * batch * (tp_size - 1)
    if kind == "greedy":  # the maximum of the shard, in BF16
        shared = {"received": results, "moved": 2 * shard, "logits": 2 * shard}
    else:
        shared = {
            "received": 2 * shard * others + results,
            "moved": PASSES[kind] * shard,
            "logits": (2 + 2 + 4) * shard,  # own, received, cast
        }
    whole = {
        "received": 2 * logits * others,
        "moved": PASSES[kind] * logits,
        "logits": (2 + 4) * logits + 2 * shard,
    }
    sides = {}
    for way, side in zip(WAYS, (whole, shared), strict=True):
        seconds = side["received"] / (gpu.link_gbps * 1e9) + side["moved"] / (gpu.hbm_gbps * 1e9)
        sides[way] = {**side, "milliseconds": 1e3 * seconds}
    return {
        "kind": kind, "tp_size": tp_size, "vocab_size": vocab_size, "batch": batch,
        "gpu": gpu_name, **sides,
    }  # fmt: skip


def measured_table(results: dict[str, Any]) -> Table:
    heads = ["sampling", "batch", *(f"{way} (ms)" for way in WAYS), "ratio"]
    rows = [
        [
            row["kind"],
            str(row["batch"]),
            *(ranged(row[way], 1) for way in WAYS),
            ranged(row[RATIO]),
        ]
        for row in results["rows"]
    ]
    return heads, rows


def model_table(results: dict[str, Any]) -> Table:
    heads = ["sampling", "TP, batch", "way", "received (MB)", "logits (MB)", "time (ms)"]
    rows = [
        [
            row["kind"],
            f"{row['tp_size']}, {row['batch']:,}",
            way,
            f"{row[way]['received'] / 1e6:.1f}",
            f"{row[way]['logits'] / 1e6:.0f}",
            f"{row[way]['milliseconds']:.2f}",
        ]
        for row in results["model"]
        for way in WAYS
    ]
    return heads, rows


def summary(results: dict[str, Any]) -> str:
    ranks = results["ranks"]
    where = "GPUs (NCCL)" if ranks["device"] == "cuda" else "CPU ranks (gloo)"
    return (
        f"Measured on {ranks['tp_size']} {where}, a vocabulary of {ranks['vocab_size']:,}. The "
        "model: peaks of the links and the memory of an H100, no latencies."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU rank")
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import torch

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.device_count() >= args.tp else "cpu"
    ranks = Ranks(args.tp, args.device, args.threads, args.vocab, args.seed)
    results = {
        "arguments": vars(args),
        "ranks": vars(ranks),
        "rows": measure(ranks, args),
        "model": [modelled(kind, 8, VOCAB, 1024, "H100") for kind in PASSES],
    }
    record("sampling", results)
    print(plain(*measured_table(results)))
    print(plain(*model_table(results)))
    print(summary(results))


if __name__ == "__main__":
    main()

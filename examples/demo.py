"""What SiDP does, in three minutes on any machine: `make demo`, or `make demo MODEL=moe` for a
mixture of experts.

The same few-shot job on sgl.Engine with four data-parallel ranks, first plain, then with
`sidp=True`, on pretended devices that are small for the weights: more KV cache, larger batches,
more tokens per second, the same answers.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import psutil
from tqdm import tqdm

from bench.offline import JobResult, apart, run_job, shut_down, start_engine
from examples.demo_model.arithmetic import few_shot_header, final_answer, held_out_problems

DP_SIZE = 4
HEADER_TOKENS = 160
MAX_NEW_TOKENS = 96
LEAST_EXACT = 0.9  # of the answers: a model that was not loaded right has none


class Model(NamedTuple):
    folder: str  # of its checkpoint, below demo_model
    device_memory: str  # of each pretended device: little more than the weights take
    num_problems: int


MODELS = {"dense": Model("checkpoint", "7.9MB", 64), "moe": Model("moe", "10.3MB", 48)}


@contextlib.contextmanager
def quiet() -> Iterator[TextIO]:
    """The terminal for this file alone: what SGLang and its processes write goes to a file that is
    shown where they fail."""
    streams = (1, 2)
    kept = [os.dup(stream) for stream in streams]
    with tempfile.TemporaryFile("w+") as log, os.fdopen(os.dup(2), "w") as terminal:
        for stream in streams:
            os.dup2(log.fileno(), stream)
        try:
            yield terminal
        except Exception:
            log.seek(0)
            terminal.write(log.read())
            raise
        finally:
            for stream, file in zip(streams, kept, strict=True):
                os.dup2(file, stream)
                os.close(file)


def num_started() -> int:
    """Ranks of this process's engine that have imported SGLang: they have their names then."""
    count = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            count += "".join(process.cmdline()[:1]).startswith("sglang::scheduler")
    return count


@contextlib.contextmanager
def ranks_on(bar: tqdm) -> Iterator[None]:
    """The bar counts the ranks that start inside."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.5):
            bar.n = num_started()
            bar.refresh()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def run(prompts: list[str], dp_size: int, **keywords: Any) -> tuple[JobResult, list[dict]]:
    """One engine, one job: the result and every rank's state."""
    label = "SiDP" if keywords.get("sidp") else "plain DP"
    with (
        quiet() as terminal,
        tqdm(total=dp_size, desc=f"{label:>8}: starting", unit="rank", file=terminal) as bar,
    ):
        with ranks_on(bar):
            engine = start_engine(dp_size=dp_size, **keywords)
        try:
            # Warm-up: one request per rank, so that both sides start with the same caches.
            for rank in range(dp_size):
                engine.generate(prompts[0], {"max_new_tokens": 4}, routed_dp_rank=rank)
            engine.flush_cache()
            bar.unit = "prompt"
            bar.reset(len(prompts))
            bar.set_description(f"{label:>8}: generating")
            sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS}
            result = run_job(engine, dp_size, prompts, sampling, bar.update)
            states = engine.get_server_info()["internal_states"]
        finally:
            shut_down(engine)
    return result, states


def table(rows: list[tuple[str, str, str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def weight_bytes(sidp: dict[str, Any]) -> int:
    return sidp["replicated_bytes"] + sidp["owned_bytes"] + sidp["cache_bytes"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="dense")
    parser.add_argument("--problems", type=int)
    parser.add_argument("--dp-size", type=int, default=DP_SIZE)
    parser.add_argument("--device-memory", help="of each pretended device")
    args = parser.parse_args()
    model_path = str(Path(__file__).parent / "demo_model" / MODELS[args.model].folder)
    device_memory = args.device_memory or MODELS[args.model].device_memory
    os.environ["SIDP_CPU_DEVICE_MEMORY"] = device_memory
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of SGLang's imports, once per process

    header = few_shot_header(num_tokens_min=HEADER_TOKENS)
    problems = held_out_problems(args.problems or MODELS[args.model].num_problems)
    prompts = [header + prompt for prompt, _ in problems]
    print(
        f"{len(prompts)} held-out sums behind one few-shot header of {len(header)} tokens, "
        f"{args.dp_size} ranks, {device_memory} of device memory each.\n"
        "Each engine takes up to a minute to start.",
        flush=True,
    )
    started = time.perf_counter()
    plain, plain_states = run(prompts, args.dp_size, model_path=model_path)
    pooled, pooled_states = run(prompts, args.dp_size, model_path=model_path, sidp=True)
    plain_kv, pooled_kv = (
        states[0]["memory_usage"]["token_capacity"] for states in (plain_states, pooled_states)
    )
    sidp = [state["sidp"] for state in pooled_states]
    all_weights = sidp[0]["replicated_bytes"] + sidp[0]["pooled_bytes"]

    def exact(result: JobResult) -> float:
        right = [
            final_answer(output) == answer
            for output, (_, answer) in zip(result.outputs, problems, strict=True)
        ]
        return sum(right) / len(right)

    read = max(status["checkpoint_bytes_read"] for status in sidp)
    identical = plain.outputs == pooled.outputs
    print()
    print(
        table(
            [
                ("per rank, where it applies", "plain DP", "SiDP"),
                ("weights and slots (MB)", f"{all_weights / 1e6:.2f}", mega(sidp)),
                ("read from the checkpoint (MB)", f"{all_weights / 1e6:.2f}", f"{read / 1e6:.2f}"),
                ("KV cache (tokens)", f"{plain_kv:,}", f"{pooled_kv:,}"),
                ("mean decode batch", f"{plain.mean_batch:.1f}", f"{pooled.mean_batch:.1f}"),
                ("prefix-cache hit rate", f"{plain.hit_rate:.1%}", f"{pooled.hit_rate:.1%}"),
                (
                    "tokens per second (all ranks)",
                    f"{plain.tokens_per_second:,.0f}",
                    f"{pooled.tokens_per_second:,.0f}",
                ),
                ("exact match", f"{exact(plain):.1%}", f"{exact(pooled):.1%}"),
            ]
        )
    )
    speedup = pooled.tokens_per_second / plain.tokens_per_second
    print(
        f"\nKV cache x{pooled_kv / plain_kv:.2f}, throughput x{speedup:.2f}, "
        f"outputs {'identical' if identical else 'DIFFERENT'}, "
        f"{sum(status['was']['fetches'] for status in sidp):,} blocks fetched "
        f"({sum(status['was']['bytes'] for status in sidp) / 1e6:,.0f} MB), "
        f"{time.perf_counter() - started:.0f} s in all."
    )
    if exact(plain) < LEAST_EXACT:
        print("The model's answers are wrong with plain SGLang too: the comparison says nothing.")
        return 1
    return 0 if identical else 1


def mega(statuses: list[dict[str, Any]]) -> str:
    return f"{max(map(weight_bytes, statuses)) / 1e6:.2f}"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(apart(main))
    sys.exit(130)

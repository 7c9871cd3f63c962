"""What the DP controller's policy takes per request while 100,000 are queued; without engines.

Prompts share headers; ranks report as fast as they are given work, so that every request is chosen
from the full window.
"""

import argparse
import random
import time
from array import array
from typing import Any

from msgspec.structs import replace

from bench.record import record, spread
from bench.tables import Table, plain, ranged
from sidp_sgl.scheduler.dispatch.policy import Dispatcher
from sidp_sgl.scheduler.dispatch.prompts import prompt_key
from sidp_sgl.scheduler.dispatch.window import Queued
from sidp_sgl.scheduler.messages import RankState

KV_TOKENS = 1_000_000
BATCH = 64  # requests that a rank takes per report
HEADS = ["queued", "prompt tokens", "arrival (µs)", "choice (µs)"]


def measure(queued: int, prompt_tokens: int, ranks: int, seed: int) -> dict[str, float]:
    """Microseconds per request, for its arrival and for the choice of its rank."""
    random_ = random.Random(seed)
    headers = [[random_.randrange(50_000) for _ in range(prompt_tokens - 50)] for _ in range(64)]
    prompts = [
        array("q", random_.choice(headers) + [random_.randrange(50_000) for _ in range(50)])
        for _ in range(2000)
    ]
    dispatcher = Dispatcher(ranks, is_job=True)
    begun = time.perf_counter()
    for number in range(queued):
        prompt = prompts[number % len(prompts)]
        request = Queued(number, prompt_key(prompt), len(prompt), 128, None)
        dispatcher.window.add(request)
    arrival = time.perf_counter() - begun
    states = [RankState(n, 0, 0, 0, BATCH, KV_TOKENS, KV_TOKENS) for n in range(ranks)]
    taken = 0
    begun = time.perf_counter()
    for number in range(1, 10_000 // (BATCH * ranks) + 1):
        for state in states:
            received = BATCH * (number - 1)
            dispatcher.update(replace(state, received=received))
        taken += sum(1 for _ in dispatcher.assign())
    choice = time.perf_counter() - begun
    assert taken >= 0.9 * BATCH * ranks * (10_000 // (BATCH * ranks)), taken
    return {"arrival": 1e6 * arrival / queued, "choice": 1e6 * choice / taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queued", type=int, default=100_000)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[100, 1000, 4000])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for length in args.prompt_tokens:
        runs = [
            measure(args.queued, length, args.ranks, args.seed + n) for n in range(args.repeats)
        ]
        row = {name: spread([run[name] for run in runs]) for name in ("arrival", "choice")}
        rows.append({"queued": args.queued, "prompt_tokens": length, **row})
    results = {"arguments": vars(args), "microseconds": rows}
    record("dispatch_overhead", results)
    print(plain(*table(results)))


def table(results: dict[str, Any]) -> Table:
    rows = [
        [
            f"{row['queued']:,}",
            f"{row['prompt_tokens']:,}",
            *(ranged(row[name], 0) for name in ("arrival", "choice")),
        ]
        for row in results["microseconds"]
    ]
    return HEADS, rows


if __name__ == "__main__":
    main()

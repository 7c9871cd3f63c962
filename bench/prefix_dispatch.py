"""A few-shot evaluation with several headers: round robin against `--load-balance-method sidp`.

Eight headers of different lengths, more than one rank's KV cache holds; every prompt is one of them
and a question. Round robin gives every rank every header.
"""

import argparse

import numpy as np

from bench.methods import compare, table
from bench.record import record
from bench.tables import plain

HEADERS = (48, 96, 144, 192, 240, 288, 336, 384)  # tokens


def make_job(requests: int, question_tokens: int, seed: int) -> list[list[int]]:
    """Token ids, in random order."""
    rng = np.random.default_rng(seed)
    headers = [rng.integers(4, 60, length).tolist() for length in HEADERS]
    order = rng.permutation(requests) % len(headers)
    return [headers[n] + rng.integers(4, 60, question_tokens).tolist() for n in order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--question-tokens", type=int, default=12)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--dp-size", type=int, default=4)
    parser.add_argument("--device-memory", default="7.9MB")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = compare(
        make_job(args.requests, args.question_tokens, args.seed),
        {"temperature": 0, "max_new_tokens": args.output_tokens, "ignore_eos": True},
        dp_size=args.dp_size,
        device_memory=args.device_memory,
        repeats=args.repeats,
    )
    name = "prefix_dispatch" if args.requests >= 2000 else "prefix_dispatch_quick"
    record(name, {"arguments": vars(args), "headers": HEADERS, **results})
    print(plain(*table(results)))


if __name__ == "__main__":
    main()

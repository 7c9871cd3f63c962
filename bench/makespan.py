"""Long-tailed outputs: idle ranks with and without requests that move.

Round robin fixes each request's rank when it comes; with `sidp` it waits until a rank has room,
the long ones first, and what waits at one rank moves to another.
"""

import argparse

import numpy as np

from bench.demo_job import make_prompts
from bench.methods import compare, table
from bench.record import record
from bench.tables import plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--input-tokens", type=int, default=32)
    parser.add_argument("--median-tokens", type=float, default=24.0, help="of the output lengths")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the lengths' logarithm")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--dp-size", type=int, default=4)
    parser.add_argument("--device-memory", default="7.9MB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lengths = np.random.default_rng(args.seed).lognormal(
        np.log(args.median_tokens), args.sigma, args.requests
    )
    lengths = np.clip(np.rint(lengths), 4, args.max_tokens).astype(int).tolist()
    results = compare(
        make_prompts(args.requests, args.input_tokens, args.seed),
        [{"temperature": 0, "max_new_tokens": n, "ignore_eos": True} for n in lengths],
        dp_size=args.dp_size,
        device_memory=args.device_memory,
        repeats=args.repeats,
    )
    name = "makespan" if args.requests >= 256 else "makespan_quick"
    record(name, {"arguments": vars(args), "output_lengths": lengths, **results})
    print(plain(*table(results)))


if __name__ == "__main__":
    main()

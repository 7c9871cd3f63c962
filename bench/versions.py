"""Is this tree as fast as commit BASE? Both in one run, side by side, alternating.

    python -m bench.versions BASE [--only was linear cas demo] [--rounds N] [--starts N] [--quick]

BASE is checked out as a git worktree in a temporary folder, which goes when the run ends, and runs
in this Python environment. Measured are decode steps at a constant batch with `sidp_mode` was
(pools `ffn` and `linear`) and cas (two ranks, link not paced: what differs is the engine's own
work), and the job of examples/demo.py. For each of them one engine per side is up; only one has
requests at a time, the other's ranks sleep, and every round begins with the other side. A round's
ratio is the time of this tree over that of BASE, per step or per token; the median over the rounds
may be up to 1.03. Beside it stands the ratio of the processor time that all processes had for it:
where others use the cores as well it says more, but it does not see waiting.

Two engines of the same code may differ by some percent for as long as they live, so `--starts`
pairs are started one after the other, each time another side first, and the median is over the
rounds of all. On a busy machine single rounds differ by a factor of two. What the machine itself
does to the result shows `python -m bench.versions HEAD` on a clean tree.

Both sides get the same flags, which BASE must know. Results are bench/results/versions.json, or
versions_quick.json where not all of it ran. Ten minutes (--quick) to half an hour; 14 GB of memory.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.constant_batch import ENVIRONMENT, KEYWORDS, run_batch, run_steps
from bench.demo_job import CHECKPOINT
from bench.record import over, record, spread
from bench.side import ROOT, Side, rotated
from bench.tables import Table, plain, ranged
from examples import demo
from examples.demo_model.arithmetic import few_shot_header, held_out_problems

LIMIT = 1.03
BATCHES = {"was": 16, "cas": 8}  # of every rank
STEPS = 32
SEED = 0
HEADS = [
    "",
    "base",
    "new",
    "new over base",
    "of each start",
    "processor time",
    f"at most {LIMIT}",
]


class Taken(NamedTuple):
    """By one step or token, in milliseconds; processor time is of all ranks and processes."""

    time: float
    cpu: float


@dataclass(frozen=True)
class Measurement:
    """`run`: one round on a side; `unit`: what its times are of."""

    unit: str
    environment: dict[str, str]
    keywords: dict[str, Any]
    run: Callable[[Side], Taken]


def decode_steps(mode: str, pool: str = "ffn") -> Measurement:
    batch, ranks = BATCHES[mode], [0, 1]

    def run(side: Side) -> Taken:
        run_batch(side, batch, 8, ranks, SEED)  # uncounted: the other side had the caches
        steps = run_steps(side, batch, STEPS, ranks, SEED)
        assert (steps.cas_share > 0.5) == (mode == "cas"), f"{steps.cas_share:.0%} of steps in CaS"
        all_steps = steps.was_steps + steps.cas_steps
        return Taken(1e3 * steps.seconds, 1e3 * steps.cpu_seconds / all_steps)

    sidp = {"sidp_mode": mode, "sidp_pool": pool}
    keywords = {"dp_size": 2, "skip_tokenizer_init": True, **sidp, **KEYWORDS}
    environment = {**ENVIRONMENT, "SIDP_CPU_DEVICE_MEMORY": "256MB"}
    return Measurement("step", environment, keywords, run)


def demo_job(num_problems: int) -> Measurement:
    header = few_shot_header(num_tokens_min=demo.HEADER_TOKENS)
    prompts = [header + prompt for prompt, _ in held_out_problems(num_problems)]
    sampling = {"temperature": 0, "max_new_tokens": demo.MAX_NEW_TOKENS}

    def run(side: Side) -> Taken:
        job = side.run(prompts, sampling)
        return Taken(1e3 / job.tokens_per_second, 1e3 * job.cpu_seconds / job.output_tokens)

    environment = {"SIDP_CPU_DEVICE_MEMORY": demo.DEVICE_MEMORY}
    return Measurement("token", environment, {"dp_size": demo.DP_SIZE}, run)


def measurements(quick: bool) -> dict[str, Measurement]:
    return {
        "was": decode_steps("was"),
        "linear": decode_steps("was", "linear"),
        "cas": decode_steps("cas"),
        "demo": demo_job(demo.NUM_PROBLEMS // 4 if quick else demo.NUM_PROBLEMS),
    }


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sidp-versions-") as folder:
        tree = Path(folder) / "base"
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def compare(
    name: str, measurement: Measurement, trees: dict[str, Path], rounds: int
) -> list[dict[str, Taken]]:
    """One engine per side. What every round took, by side."""
    found = []
    common = {"model_path": str(CHECKPOINT), "sidp": True, **measurement.keywords}
    with ExitStack() as stack:
        sides = {
            side: stack.enter_context(Side(side, measurement.environment, common, tree=tree))
            for side, tree in trees.items()  # in this order, for it may matter
        }
        for number in range(rounds + 1):  # the first one is for warming up
            taken = {side: measurement.run(sides[side]) for side in rotated(list(sides), number)}
            base, new = taken["base"], taken["new"]
            print(
                f"{name} {number}/{rounds}: {base.time:.2f} → {new.time:.2f} ms, processors "
                f"{base.cpu:.2f} → {new.cpu:.2f} ms",
                file=sys.stderr,
            )
            found.append(taken)
    return found[1:]


def result_of(unit: str, starts: list[list[dict[str, Taken]]]) -> dict[str, Any]:
    """`starts`: the rounds of every pair of engines."""

    def times(side: str, field: str, rounds: list[dict[str, Taken]]) -> list[float]:
        return [getattr(taken[side], field) for taken in rounds]

    def ratio(field: str, rounds: list[dict[str, Taken]]) -> dict[str, Any]:
        return over(times("new", field, rounds), times("base", field, rounds))

    rounds = [taken for each in starts for taken in each]
    return {
        "unit": unit,
        "base": spread(times("base", "time", rounds)),
        "new": spread(times("new", "time", rounds)),
        "new_over_base": ratio("time", rounds),
        "of_each_start": [ratio("time", each)["median"] for each in starts],
        "processors_new_over_base": ratio("cpu", rounds),
        "passes": ratio("time", rounds)["median"] <= LIMIT,
    }


def table(results: dict[str, Any]) -> Table:
    rows = [
        [
            f"{name} (ms per {result['unit']})",
            *(f"{result[side]['median']:.2f}" for side in ("base", "new")),
            ranged(result["new_over_base"]),
            " ".join(f"{median:.2f}" for median in result["of_each_start"]),
            ranged(result["processors_new_over_base"]),
            "passes" if result["passes"] else "FAILS",
        ]
        for name, result in results["measured"].items()
    ]
    return HEADS, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = list(measurements(True))
    parser.add_argument("base", metavar="BASE", help="a commit")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, help="of each pair of engines (12; quick: 6)")
    parser.add_argument("--starts", type=int, help="pairs of engines (3; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="fewer, and a quarter of the demo")
    args = parser.parse_args()
    rounds = args.rounds or (6 if args.quick else 12)
    starts = args.starts or (2 if args.quick else 3)
    try:
        commit = git("rev-parse", "--verify", f"{args.base}^{{commit}}")
    except subprocess.CalledProcessError:
        parser.error(f"{args.base} is no commit of this repository")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves the worktree's block
    measured = {}
    with checked_out(commit) as tree:
        for name in args.only:
            measurement = measurements(args.quick)[name]
            trees = [("base", tree), ("new", ROOT)]
            found = [
                compare(name, measurement, dict(rotated(trees, start)), rounds)
                for start in range(starts)
            ]
            measured[name] = result_of(measurement.unit, found)
    results = {
        "arguments": vars(args),
        "base": commit,
        "limit": LIMIT,
        "rounds": rounds,
        "starts": starts,
        "seed": SEED,
        "measured": measured,
    }
    is_complete = args.only == names and not args.quick
    record("versions" if is_complete else "versions_quick", results)
    print(plain(*table(results)))
    if not all(result["passes"] for result in measured.values()):
        sys.exit(f"error: slower than {args.base} by more than {LIMIT - 1:.0%}")


if __name__ == "__main__":
    main()

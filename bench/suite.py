"""`make bench`: every bench that the machine allows, one after the other, then docs/benchmarks.md.

Each writes bench/results/NAME.json beside hardware, versions and command. A bench that fails does
not stop the others; the exit status tells.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from bench import page
from bench.record import gpus


@dataclass(frozen=True)
class Bench:
    """`memory_gb`: what must be free; `minutes`: what it takes on two cores, or on GPUs.
    `arguments`: of module `module`, which is bench.`name` where it is not given."""

    name: str
    memory_gb: float
    minutes: float
    gpus: int = 0  # at least
    module: str = ""
    arguments: tuple[str, ...] = ()


BENCHES = (
    Bench("prefetch_order", 2, 5),
    Bench("was_throughput", 20, 6),
    Bench("round_trip", 2, 1),
    Bench("owner_share", 8, 2),
    Bench("iteration_time", 10, 20),
    Bench("tail", 20, 20),
    Bench("tail_tp2", 20, 10, module="tail", arguments=("--tp", "2", "--dp-size", "2")),
    Bench("residency", 12, 12),
    Bench("prefill", 20, 10),
    Bench("growth", 20, 8),
    Bench("validate_model", 8, 12),
    Bench("paper", 1, 4),
    Bench("scale", 3, 6),
    Bench("prefix_dispatch", 14, 9),
    Bench("makespan", 14, 4),
    Bench("fairness", 10, 12),
    Bench("dispatch_overhead", 2, 2),
    Bench("batch_memory", 2, 3),
    Bench("sampling", 6, 4),
    Bench("peers", 32, 30, gpus=2),
)


def obstacle(bench: Bench) -> str | None:
    """Why the machine does not allow it."""
    if len(gpus()) < bench.gpus:
        return f"needs {bench.gpus} NVIDIA GPUs, {len(gpus())} are here"
    free = psutil.virtual_memory().available / 1e9
    if free < bench.memory_gb:
        return f"needs {bench.memory_gb:g} GB of free memory, {free:.0f} GB are"
    return None


def run(bench: Bench) -> bool:
    """Whether it ended well; five times its usual time is the limit."""
    print(f"\n{bench.name}: about {bench.minutes:g} minutes", flush=True)
    begun = time.monotonic()
    command = [sys.executable, "-m", f"bench.{bench.module or bench.name}", *bench.arguments]
    try:
        status = subprocess.run(command, timeout=5 * 60 * bench.minutes).returncode
    except subprocess.TimeoutExpired:
        status = None
    how = {0: "done", None: "took too long and was ended"}.get(status, f"FAILED ({status})")
    print(f"{bench.name}: {how} after {time.monotonic() - begun:.0f} s", flush=True)
    return status == 0


def run_all(benches: Sequence[Bench]) -> list[str]:
    """Names of those that failed."""
    failed = []
    for bench in benches:
        if reason := obstacle(bench):
            print(f"\n{bench.name}: left out, it {reason}", flush=True)
        elif not run(bench):
            failed.append(bench.name)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [bench.name for bench in BENCHES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page anew")
    args = parser.parse_args()
    failed = [] if args.page else run_all([b for b in BENCHES if b.name in args.only])
    page.write()
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""Round trip of one remote unit between two CPU ranks, and the parts it is made of.

Two processes over the real calls and compute service, without an engine: an owner that is idle,
one whose scheduler computes in the same process (it holds Python's lock and the core), and one on
a machine where every core is busy besides. The unit has the shape of the demo model's FFN.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any

import torch

from bench.record import record
from bench.tables import Table, plain
from sidp_sgl.weightpool.cas.mailbox import Call, Outcome
from sidp_sgl.weightpool.cas.requester import Requester
from sidp_sgl.weightpool.cas.service import Service
from sidp_sgl.weightpool.cas.staging import Staging, make_staging
from sidp_sgl.weightpool.cas.unit import PooledUnit, RowType
from sidp_sgl.weightpool.transport.shm.mailbox import ShmMailbox

HIDDEN, INTERMEDIATE = 128, 512
PARTS = ("write rows", "wake owner", "compute", "wake requester", "read result")
SITUATIONS = ("owner idle", "owner computes", "all cores busy")


class TimedCalls(ShmMailbox):
    """Calls that note when each came to which point, in monotonic nanoseconds."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.moments: dict[str, list[int]] = {name: [] for name in ("sent", "got", "done", "back")}

    def send(self, *args: Any) -> None:
        self.moments["sent"].append(time.monotonic_ns())
        super().send(*args)

    def wait(self, *args: Any) -> Outcome:
        outcome = super().wait(*args)
        self.moments["back"].append(time.monotonic_ns())
        return outcome

    def receive(self, seconds: float) -> list[Call]:
        calls = super().receive(seconds)
        self.moments["got"] += [time.monotonic_ns()] * len(calls)
        return calls

    def answer(self, call: Call, outcome: Outcome) -> None:
        self.moments["done"].append(time.monotonic_ns())
        super().answer(call, outcome)


def ffn_unit() -> PooledUnit:
    up = torch.randn(2 * INTERMEDIATE, HIDDEN, dtype=torch.bfloat16)
    down = torch.randn(HIDDEN, INTERMEDIATE, dtype=torch.bfloat16)

    def compute(rows: torch.Tensor) -> torch.Tensor:
        gate, value = torch.nn.functional.linear(rows, up).chunk(2, dim=-1)
        return torch.nn.functional.linear(torch.nn.functional.silu(gate) * value, down)

    row = RowType(HIDDEN, torch.bfloat16)
    return PooledUnit(0, 0, True, (row,), row, compute, compute)


def on_core(index: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[index % len(cores)]})
    torch.set_num_threads(1)


def spin() -> None:
    """What a decode step is: many small operators, called from Python."""
    unit, rows = ffn_unit(), torch.randn(8, HIDDEN, dtype=torch.bfloat16)
    with torch.inference_mode():
        while True:
            unit.partial(rows)


def own_owner(pipe: Connection, staging: Staging, computes: bool, switch_interval: float) -> None:
    on_core(1)
    sys.setswitchinterval(switch_interval)
    calls = TimedCalls(1, staging)
    pipe.send([DupFd(fd) for fd in calls.export()])
    calls.connect(0, [fd.detach() for fd in pipe.recv()])
    Service(calls, {0: ffn_unit()}).start()
    if computes:
        threading.Thread(target=spin, daemon=True).start()
    pipe.send("ready")
    pipe.recv()
    pipe.send((calls.moments["got"], calls.moments["done"]))


def busy_process() -> None:
    torch.set_num_threads(1)
    spin()


def measure(situation: str, num_rows: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Microseconds of every part and of the whole, call by call."""
    context = multiprocessing.get_context("spawn")
    pipe, child = context.Pipe()
    staging = make_staging([ffn_unit().row_bytes], 2)
    computes = situation != "owner idle"
    processes = [
        context.Process(
            target=own_owner, args=(child, staging, computes, args.switch_interval), daemon=True
        )
    ]
    if situation == "all cores busy":
        cores = len(os.sched_getaffinity(0))
        processes += [context.Process(target=busy_process, daemon=True) for _ in range(cores)]
    for process in processes:
        process.start()
    try:
        calls = TimedCalls(0, staging)
        theirs = [fd.detach() for fd in pipe.recv()]
        pipe.send([DupFd(fd) for fd in calls.export()])
        calls.connect(1, theirs)
        assert pipe.recv() == "ready"
        if len(processes) > 1:
            time.sleep(8.0)  # until they have imported and spin
        return _round_trips(calls, Requester(calls, staging), pipe, num_rows, args.calls)
    finally:
        for process in processes:
            process.kill()


def _round_trips(
    calls: TimedCalls, requester: Requester, pipe: Connection, num_rows: int, count: int
) -> dict[str, list[float]]:
    unit, rows = ffn_unit(), torch.randn(num_rows, HIDDEN, dtype=torch.bfloat16)
    begun, ended, local = [], [], []
    requester.begin_step(num_rows)
    with torch.inference_mode():
        for _ in range(count):
            time.sleep(0.0005)  # attention and the like, between two units
            begun.append(time.monotonic_ns())
            assert requester.call([1], unit, [rows]) is not None
            ended.append(time.monotonic_ns())
            unit.partial(rows)
            local.append(time.monotonic_ns() - ended[-1])
    pipe.send(None)
    got, done = pipe.recv()
    points = [begun, calls.moments["sent"], got, done, calls.moments["back"], ended]
    result = {
        part: [(b - a) / 1e3 for a, b in zip(first, second, strict=True)]
        for part, first, second in zip(PARTS, points, points[1:], strict=False)
    }
    result["round trip"] = [(b - a) / 1e3 for a, b in zip(begun, ended, strict=True)]
    result["computed here"] = [value / 1e3 for value in local]
    return result


def percentiles(values: Sequence[float]) -> dict[str, float]:
    cut = statistics.quantiles(values, n=100)
    return {"p50": cut[49], "p90": cut[89], "p99": cut[98], "mean": statistics.fmean(values)}


def table(results: dict[str, Any]) -> Table:
    columns = [*PARTS, "round trip", "computed here"]
    heads = ["situation", "rows", *(f"{column} (µs)" for column in columns)]
    rows = [
        [row["situation"], str(row["rows"]), *(f"{row[column]['p50']:.0f}" for column in columns)]
        for row in results["microseconds"]
    ]
    return heads, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--switch-interval", type=float, default=0.005)
    parser.add_argument("--situations", nargs="+", default=SITUATIONS)
    args = parser.parse_args()
    on_core(0)
    rows = []
    for situation in args.situations:
        for num_rows in args.rows:
            parts = {k: percentiles(v) for k, v in measure(situation, num_rows, args).items()}
            rows.append({"situation": situation, "rows": num_rows, **parts})
            print(f"{situation}, {num_rows} rows", file=sys.stderr)
    results = {"arguments": vars(args), "microseconds": rows}
    record("round_trip", results)
    print(plain(*table(results)))


if __name__ == "__main__":
    main()

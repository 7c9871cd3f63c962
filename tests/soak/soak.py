"""Minutes of random load on an engine whose ranks switch modes, decline, answer late and are
stopped now and then: every request gets its answer, every row is served once, nothing grows.

`python -m tests.soak.soak --minutes 10 --seed 0`; results in bench/results/soak.json.
"""

import argparse
import asyncio
import contextlib
import os
import sys
import time
from dataclasses import asdict, replace
from typing import Any
from unittest.mock import patch

import psutil
import sglang

from bench.demo_job import CHECKPOINT
from bench.record import record
from sidp_sgl.scheduler.lifecycle.liveness import RankFailure
from tests.soak.load import Load, Request, make_requests, texts_of
from tests.soak.ranks import Resources, Stops, rank_processes, resources
from tests.support.disturbances import Disturbances, disturbed
from tests.support.engines import engine, statuses

DEVICE_MEMORY = "10MB"  # KV for a few requests: others wait
DP_SIZE = 4
MODES = ("was", "cas", "local")
NUM_REQUESTS = 300
WARM_UP_SECONDS = 60.0
DISTURBANCES = Disturbances(switch_every=5, decline=0.1, delay=0.05, delay_ms=20)
COUNTERS = (
    "requests",
    "granted",
    "declined",
    "silent",
    "stale",
    "dropped_messages",
    "rows_sent",
    "rows_served",
    "fused_gemms",
    "fallbacks",
)


def expected_texts(requests: list[Request]) -> list[str]:
    """Of an engine that only streams weights, undisturbed."""
    with engine(CHECKPOINT, dp_size=DP_SIZE, sidp=True, sidp_mode="was") as running:
        return running.loop.run_until_complete(texts_of(running, requests))


async def disturb(load: Load, stops: Stops, seconds: float) -> Resources:
    """The whole load. Returns what the ranks hold after the first minute."""
    stopping = asyncio.ensure_future(stops.run())
    loading = asyncio.ensure_future(load.run(seconds))
    await asyncio.wait([loading], timeout=min(WARM_UP_SECONDS, seconds / 2))
    early = resources(stops.processes)
    await loading
    stopping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await stopping
    return early


def settled(running: sglang.Engine) -> list[dict[str, Any]]:
    """Statuses once the last late rows have been served, at most some seconds from now."""
    deadline = time.monotonic() + 10.0
    while True:
        states = statuses(running)
        if rows(states, "served") == rows(states, "sent") or time.monotonic() > deadline:
            return states
        time.sleep(0.2)


def rows(states: list[dict[str, Any]], which: str) -> int:
    return sum(state["cas"][f"rows_{which}"] for state in states)


def problems_of(states: list[dict[str, Any]], early: Resources, late: Resources) -> list[str]:
    problems = []
    sent, served = rows(states, "sent"), rows(states, "served")
    if not sent == served > 0:
        problems.append(f"{sent} rows were sent, {served} served")
    for state in states:
        name, cas = f"rank {state['dp_rank']}", state["cas"]
        if cas["failed"] or cas["malformed_messages"]:
            problems.append(
                f"{name}: {cas['failed']} failed, {cas['malformed_messages']} malformed"
            )
        if not (
            state["iterations"]["cas"] and state["iterations"]["was"] and state["mode_switches"]
        ):
            problems.append(f"{name} did not change its mode: {state['iterations']}")
        if state["running_batch_size"] or state["waiting_requests"]:
            problems.append(f"{name} still has requests")
    for what in ("kept", "dropped"):
        if not any(state["residency"][what] for state in states):
            problems.append(f"no rank has {what} a block")
    for what in ("descriptors", "threads"):
        before, after = getattr(early, what), getattr(late, what)
        if any(new > old for old, new in zip(before, after, strict=True)):
            problems.append(f"{what} of the ranks grew from {before} to {after}")
    return problems


def soak(args: argparse.Namespace) -> dict[str, Any]:
    requests = make_requests(NUM_REQUESTS, args.seed)
    texts = expected_texts(requests)
    disturbances = replace(DISTURBANCES, seed=args.seed)
    with (
        disturbed(disturbances),
        engine(CHECKPOINT, dp_size=DP_SIZE, sidp=True, sidp_mode="auto") as running,
    ):
        load = Load(running, requests, texts, args.seed)
        stops = Stops(rank_processes(), args.seed)
        problems, states = load.problems, []
        early = late = Resources([], [], [])
        try:
            early = running.loop.run_until_complete(disturb(load, stops, 60 * args.minutes))
            states = settled(running)
            late = resources(stops.processes)
            problems += problems_of(states, early, late)
        except (RankFailure, psutil.NoSuchProcess) as failure:
            problems.append(str(failure))
    return {
        "arguments": vars(args),
        "dp_size": DP_SIZE,
        "device_memory": DEVICE_MEMORY,
        "disturbances": asdict(disturbances),
        "requests": dict(load.sent),
        "answered": load.answered,
        "slowest_seconds": load.slowest_seconds,
        "stops": stops.count,
        "stopped_seconds": stops.seconds,
        "iterations": {m: sum(s["iterations"][m] for s in states) for m in MODES},
        "residency": {n: sum(s["residency"][n] for s in states) for n in ("kept", "dropped")},
        "mode_switches": sum(state["mode_switches"] for state in states),
        "cas": {name: sum(state["cas"][name] for state in states) for name in COUNTERS},
        "resources": {"first minute": early._asdict(), "end": late._asdict()},
        "problems": problems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    with patch.dict(os.environ, SIDP_CPU_DEVICE_MEMORY=DEVICE_MEMORY):
        result = soak(parser.parse_args())
    record("soak", result)
    for problem in result["problems"][:20]:
        print(problem)
    cas, steps = result["cas"], result["iterations"]
    print(
        f"soak: {result['answered']} of {sum(result['requests'].values())} requests answered, "
        f"{cas['rows_served']:,} of {cas['rows_sent']:,} rows served, "
        f"{steps['cas']:,} CaS, {steps['was']:,} WaS and {steps['local']:,} local steps, "
        f"{result['residency']['kept']:,} blocks stayed, {result['residency']['dropped']:,} went, "
        f"{result['mode_switches']:,} switches, {cas['declined']:,} declines, "
        f"{cas['silent']} silences, {cas['fallbacks']} fallbacks, {result['stops']} stops; "
        f"{len(result['problems']) or 'no'} problems"
    )
    sys.exit(bool(result["problems"]))


if __name__ == "__main__":
    main()

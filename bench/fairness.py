"""Time to first token on an overloaded server, by length of the output, with SGLang's dispatcher
and with SiDP's own.

Two real servers with SiDP are up at once, and clients of three kinds load them in turns: each asks
again as soon as it has its answer. There are several times as many as the ranks run requests. What
waits is sorted by SiDP's dispatcher, and must not wait longer for it.
"""

import argparse
import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from bench.demo_job import CHECKPOINT
from bench.methods import METHODS
from bench.offline import apart
from bench.record import over, record, spread
from bench.side import rotated
from bench.tables import Table, plain, ranged

OUTPUT_TOKENS = {"short": 2, "medium": 24, "long": 100}
SECONDS, REPEATS = 60.0, 4
START_SECONDS = 600.0
SETTLE_SECONDS = 120.0
HEADER_TOKENS, QUESTION_TOKENS, HEADERS = 96, 12, 8
HEADS = [
    "outputs",
    "clients",
    "requests",
    "median (s): SGLang's dispatcher",
    "own",
    "99th percentile (s): SGLang's dispatcher",
    "own",
    "own over SGLang's",
]


@dataclass(frozen=True)
class Answered:
    """A request of the class `kind`; `sent` in seconds since the clients began."""

    kind: str
    sent: float
    first_token: float  # seconds after it was sent; at least so many, where the end came first


class Server:
    """The native API of a server that has started."""

    def __init__(self, url: str, process: subprocess.Popen) -> None:
        self.url = url
        self._process = process

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return response.read()

    def is_ready(self) -> bool:
        """Raises where it has ended."""
        if self._process.poll() is not None:
            raise RuntimeError(f"the server has ended with code {self._process.returncode}")
        with contextlib.suppress(OSError):
            self.get("/health")
            return True
        return False

    def flush(self) -> bool:
        """Empty the prefix caches; False while a request runs or waits."""
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(self.url + "/flush_cache", b"", timeout=60).close()
            return True
        return False

    def states(self) -> list[dict[str, Any]]:
        return [each["sidp"] for each in json.loads(self.get("/server_info"))["internal_states"]]


@contextmanager
def served(method: str, args: argparse.Namespace) -> Iterator[Server]:
    """A server whose requests SGLang's `method` dispatches."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(CHECKPOINT)]
    command += ["--port", str(port), "--device", "cpu", "--dp-size", str(args.dp_size), "--sidp"]
    command += ["--sidp-mode", "was", "--load-balance-method", method, "--skip-tokenizer-init"]
    command += ["--max-running-requests", str(args.running), "--log-level", "error"]
    print(f"starting {method}", file=sys.stderr)
    process = subprocess.Popen(command)
    try:
        server = Server(f"http://127.0.0.1:{port}", process)
        until(server.is_ready, START_SECONDS)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing after {seconds:.0f} s")
        time.sleep(0.2)


async def load(
    server: Server, clients: dict[str, int], seconds: float, seed: int
) -> list[Answered]:
    """Every request, also those that still wait at the end."""
    random = np.random.default_rng(seed)
    headers = random.integers(4, 60, (HEADERS, HEADER_TOKENS)).tolist()
    answered: list[Answered] = []
    begun = time.perf_counter()

    async def client(kind: str, session: httpx.AsyncClient) -> None:
        sampling = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS[kind], "ignore_eos": True}
        while True:
            question = random.integers(4, 60, QUESTION_TOKENS).tolist()
            prompt = headers[random.integers(HEADERS)] + question
            body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
            sent, first = time.perf_counter(), None
            try:
                async with session.stream("POST", server.url + "/generate", json=body) as response:
                    response.raise_for_status()
                    async for line in response.aiter_lines():
                        if first is None and line.startswith("data: {"):
                            assert "error" not in line, line
                            first = time.perf_counter()
            finally:
                waited = (first or time.perf_counter()) - sent
                answered.append(Answered(kind, sent - begun, waited))

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=None) as session:
        running = [client(kind, session) for kind, number in clients.items() for _ in range(number)]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*running), seconds)
    return answered


def percentiles(answered: list[Answered], after: float) -> dict[str, dict[str, Any]]:
    """By class, of what was sent `after` so many seconds: before, the queue was growing."""
    waits: dict[str, list[float]] = {kind: [] for kind in OUTPUT_TOKENS}
    for each in answered:
        if each.sent >= after:
            waits[each.kind].append(each.first_token)
    if missing := [kind for kind, values in waits.items() if not values]:
        raise SystemExit(
            f"error: no {' and no '.join(missing)} request was sent late enough: use more --seconds"
        )
    return {
        kind: {
            "requests": len(values),
            "median": float(np.percentile(values, 50)),
            "p99": float(np.percentile(values, 99)),
            "mean": float(np.mean(values)),
        }
        for kind, values in waits.items()
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    clients = {"short": args.short, "medium": args.medium, "long": args.long}
    runs: dict[str, list[dict[str, dict[str, Any]]]] = {method: [] for method in METHODS}
    with ExitStack() as stack:
        servers = {method: stack.enter_context(served(method, args)) for method in METHODS}
        for server in servers.values():
            asyncio.run(load(server, clients, 5.0, args.seed))  # warm-up
        for repeat in range(args.repeats):
            for method in rotated(list(METHODS), repeat):
                server = servers[method]
                until(server.flush, SETTLE_SECONDS)
                answered = asyncio.run(load(server, clients, args.seconds, args.seed + repeat))
                runs[method].append(percentiles(answered, args.seconds / 6))
                short = runs[method][-1]["short"]
                print(
                    f"{repeat + 1}/{args.repeats} {method}: {len(answered)} requests, short ones "
                    f"{short['median']:.2f} s, 99th percentile {short['p99']:.2f} s",
                    file=sys.stderr,
                )
        states = {method: server.states()[0] for method, server in servers.items()}
    dispatched = {method: state["dispatch"] for method, state in states.items()}
    assert dispatched["sidp"]["method"] == "sidp" and dispatched["sidp"]["sent"] > 0
    assert dispatched["round_robin"]["method"] == "sglang"
    return {
        "clients": clients,
        "output_tokens": OUTPUT_TOKENS,
        "dispatch": dispatched,
        "classes": {kind: row_of(kind, runs) for kind in OUTPUT_TOKENS},
    }


def row_of(kind: str, runs: dict[str, list[dict[str, dict[str, Any]]]]) -> dict[str, Any]:
    found = {
        method: {name: [run[kind][name] for run in each] for name in each[0][kind]}
        for method, each in runs.items()
    }
    return {
        "requests": {method: sum(values["requests"]) for method, values in found.items()},
        "methods": {
            method: {name: spread(values[name]) for name in ("median", "p99", "mean")}
            for method, values in found.items()
        },
        "p99_over_round_robin": over(found["sidp"]["p99"], found["round_robin"]["p99"]),
        "mean_over_round_robin": over(found["sidp"]["mean"], found["round_robin"]["mean"]),
    }


def table(results: dict[str, Any]) -> Table:
    rows = []
    for kind, row in results["classes"].items():
        figures = [ranged(row["methods"][m][name]) for name in ("median", "p99") for m in METHODS]
        rows.append(
            [
                f"{kind} ({results['output_tokens'][kind]})",
                str(results["clients"][kind]),
                " / ".join(f"{row['requests'][method]:,}" for method in METHODS),
                *figures,
                ranged(row["p99_over_round_robin"]),
            ]
        )
    return HEADS, rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dp-size", type=int, default=2)
    parser.add_argument("--running", type=int, default=8, help="--max-running-requests")
    parser.add_argument("--short", type=int, default=8, help="clients, also of the next two")
    parser.add_argument("--medium", type=int, default=8)
    parser.add_argument("--long", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--quick", action="store_true", help="one repeat of a few seconds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.repeats = 12.0, 1
    results = {"arguments": vars(args), **measure(args)}
    is_full = args.seconds >= SECONDS and args.repeats >= REPEATS
    record("fairness" if is_full else "fairness_quick", results)
    print(plain(*table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(apart(main))

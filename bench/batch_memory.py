"""Memory and speed of run-batch itself, beside an engine that answers at once: does the job's
process stay as small for a million requests as for ten thousand?

`python -m bench.batch_memory`; results in bench/results/batch_memory.json.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import orjson

from bench.record import record
from bench.tables import Table, plain
from sidp_sgl.batch.files.input import InputFile
from sidp_sgl.batch.files.output import OutputFile
from sidp_sgl.batch.files.records import Answer
from sidp_sgl.batch.files.request import COMPLETIONS, Request
from sidp_sgl.batch.files.resume import Done
from sidp_sgl.batch.files.streams import NoJournal
from sidp_sgl.batch.job import Job
from sidp_sgl.batch.progress import NO_STATUS, Progress, Tally
from sidp_sgl.batch.suspects import Suspects
from sidp_sgl.batch.window import Bounds, Window

SIZES = (10_000, 100_000, 1_000_000)
PROMPT_BYTES = 500
ANSWER = orjson.dumps({"choices": [{"index": 0, "text": "x" * 300, "finish_reason": "stop"}]})
BOUNDS = Bounds(max_in_flight=4096)


class InstantEngine:
    """Answers in the order of the requests, a thousand at a time."""

    is_ready = True
    status = NO_STATUS

    def __init__(self) -> None:
        self._waiting: deque[int] = deque()

    def send(self, request: Request) -> None:
        self._waiting.append(request.line)

    def receive(self, timeout: float) -> list[Answer]:
        number = min(1000, len(self._waiting))
        return [Answer(self._waiting.popleft(), 200, ANSWER, 100, 100) for _ in range(number)]

    def close(self) -> None: ...


def write_input(path: Path, number: int) -> None:
    with open(path, "wb") as file:
        for index in range(number):
            body = {"model": "m", "prompt": f"{index} ".ljust(PROMPT_BYTES), "max_tokens": 100}
            line = {"custom_id": f"request-{index}", "method": "POST", "url": COMPLETIONS}
            file.write(orjson.dumps({**line, "body": body}) + b"\n")


def peak_mib() -> float:
    """Of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(number: int, folder: Path) -> dict[str, Any]:
    """Check, run and a second look at the finished output, in a process of its own."""
    write_input(folder / "in", number)
    before = peak_mib()
    started = time.perf_counter()
    input_file = InputFile(folder / "in")
    contents = input_file.check()
    checked = time.perf_counter()
    output, done = OutputFile(folder / "out"), Done(contents.num_lines)
    progress = Progress(Tally(contents.num_requests, 0), io.StringIO())
    window = Window(input_file.requests(done.__contains__), BOUNDS, Suspects())
    job = Job(window, output, done, progress, NoJournal(), max_restarts=0)
    job.run(InstantEngine, lambda: None)
    output.close()
    finished = time.perf_counter()
    output, again = OutputFile(folder / "out"), Done(contents.num_lines)
    output.scan(again.add)
    assert again.num_records == number
    return {
        "requests": number,
        "input_mb": round(contents.num_bytes / 1e6, 1),
        "output_mb": round(output.num_bytes / 1e6, 1),
        "peak_mib_before": round(before, 1),
        "peak_mib": round(peak_mib(), 1),
        "checked_per_second": round(number / (checked - started)),
        "run_per_second": round(number / (finished - checked)),
        "read_again_per_second": round(number / (time.perf_counter() - finished)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, help="measure this size in this process")
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(args.one, Path(folder))))
        return
    rows = []
    for size in SIZES:
        command = [sys.executable, "-m", "bench.batch_memory", "--one", str(size)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3000)
        rows.append(json.loads(result.stdout))
    results = {"max_in_flight": BOUNDS.max_in_flight, "sizes": rows}
    record("batch_memory", results)
    print(plain(*table(results)))


def table(results: dict[str, Any]) -> Table:
    heads = ["requests", "input (MB)", "peak memory (MiB)", "checked/s", "run/s", "read again/s"]
    rates = ("checked_per_second", "run_per_second", "read_again_per_second")
    rows = [
        [
            f"{row['requests']:,}",
            f"{row['input_mb']:.0f}",
            f"{row['peak_mib']:.0f}",
            *(f"{row[rate]:,}" for rate in rates),
        ]
        for row in results["sizes"]
    ]
    return heads, rows


if __name__ == "__main__":
    main()

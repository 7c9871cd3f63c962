"""Real `sidp-sgl run-batch` processes on the demo model."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from bench.demo_job import CHECKPOINT
from examples.demo_model.arithmetic import few_shot_header, held_out_problems
from sidp_sgl.batch.engine_process import PROGRAM
from sidp_sgl.batch.files.request import CHAT, COMPLETIONS
from tests.support.traces import ranks

MAX_TOKENS = 96
DEVICE_MEMORY = "16MiB"
WAIT_SECONDS = 500.0  # an engine takes two minutes to start on a slow hour


def demo_lines(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sums for the demo model, half of them as chats; its template gives the same prompt."""
    header = few_shot_header(num_tokens_min=64)
    rng = random.Random(seed)
    lines = []
    for index, (problem, _) in enumerate(held_out_problems(number, seed)):
        prompt = header + problem
        body: dict[str, Any] = {"model": "demo", "max_tokens": MAX_TOKENS, "temperature": 0}
        url = rng.choice([CHAT, COMPLETIONS])
        if url == CHAT:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        lines.append({"custom_id": f"sum-{index}", "method": "POST", "url": url, "body": body})
    return lines


def prompt_of(line: dict[str, Any]) -> str:
    body = line["body"]
    return body["prompt"] if "prompt" in body else body["messages"][0]["content"]


def text_of(record: dict[str, Any]) -> str:
    choice = record["response"]["body"]["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


class RunBatch:
    """One run of the command over FOLDER/in and FOLDER/out, in a session of its own."""

    def __init__(self, folder: Path, *flags: str, log: Path | None = None) -> None:
        self.output = folder / "out"
        files = ["-i", str(folder / "in"), "-o", str(self.output)]
        model = ["--model", str(CHECKPOINT), "--device", "cpu", "--dp-size", "2", "--sidp"]
        command = [sys.executable, "-m", "sidp_sgl.cli", "run-batch", *files, *model, *flags]
        environment = {"SIDP_CPU_DEVICE_MEMORY": DEVICE_MEMORY, **os.environ}
        self.log = log or folder / "log"
        with open(self.log, "ab") as stderr:
            self.process = subprocess.Popen(
                command, env=environment, stderr=stderr, start_new_session=True
            )

    def num_records(self) -> int:
        try:
            return self.output.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def wait_for_records(self, number: int) -> None:
        """Until there are so many, or the command has ended."""
        self._wait_until(lambda: self.num_records() >= number)

    def wait_for_log(self, text: str) -> None:
        """Until it says so, or the command has ended."""
        self._wait_until(lambda: text in self.log.read_text())

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while self.process.poll() is None and not is_so():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def rank_processes(self) -> list[psutil.Process]:
        """The ranks of the engine that runs now, once they have their names."""
        found: list[psutil.Process] = []
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess):
                if PROGRAM in child.cmdline():
                    found += ranks(child.pid).values()
        return found

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        return self.process.wait(seconds)


@contextmanager
def run_batch(folder: Path, *flags: str) -> Iterator[RunBatch]:
    """Killed at the end where it still runs."""
    running = RunBatch(folder, *flags)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()

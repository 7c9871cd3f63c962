"""One job through twenty random ends: of its process, of a rank, of the space on its disk.

Every custom_id is answered exactly once, with what an undisturbed run says; what was finished is
never lost or run again; nothing stays on the machine. `python -m tests.soak.kills --seed 0` (root,
for a tmpfs); results in bench/results/kills.json.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.record import record
from tests.soak.disk import fill, small_disk
from tests.support.jobs import line, records, write_lines
from tests.support.run_batch import RunBatch, demo_lines, run_batch
from tests.support.traces import Traces

NUM_SUMS = 1000
STARTING = "process killed while the engine starts"
NUM_EVENTS = {STARTING: 3, "process killed": 5, "rank killed": 6, "disk full": 6}
LONGEST_START_SECONDS = 20.0  # until a kill in it
RECORDS_BETWEEN = (3, 20)
LONGEST_PAUSE_SECONDS = 0.3
FLAGS = ("--max-in-flight", "16", "--max-restarts", "100", "--sidp-mode", "was")
CLEAN_SECONDS = 20.0


class Kills:
    """The job in `disk`, and what has happened to it."""

    def __init__(self, disk: Path, seed: int, traces: Traces) -> None:
        self._disk = disk
        self.log = traces.folder.parent / "log"  # not on the disk that gets full
        self._random = random.Random(seed)
        self._traces = traces
        self._finished = b""  # the output's whole records, when last looked at
        self.torn_ends = 0
        self.problems: list[str] = []
        self.events: list[dict[str, Any]] = []

    def run(self) -> None:
        names = [name for name, number in NUM_EVENTS.items() for _ in range(number)]
        self._random.shuffle(names)
        running: RunBatch | None = None
        try:
            for name in names:
                started = time.monotonic()
                if running is None:
                    running = RunBatch(self._disk, *FLAGS, log=self.log)
                elif name == STARTING:  # again, after the loss of a rank
                    self._kill_rank(running)
                self._wait(name, running)
                if running.process.poll() is not None:
                    self.problems.append(f"the job has ended before event {len(self.events)}")
                    return
                self._traces.processes()
                is_running = self._strike(name, running)
                self.events.append(
                    {
                        "event": name,
                        "records": self._look(),
                        "seconds": round(time.monotonic() - started, 1),
                    }
                )
                print(self.events[-1], flush=True)
                running = running if is_running else None
            if running is None:
                running = RunBatch(self._disk, *FLAGS, log=self.log)
            if (code := running.wait()) != 0:
                self.problems.append(f"the last run ended with {code}")
            self._look()
            # What ran alone when a rank was killed has been taken for the cause.
            running = RunBatch(self._disk, *FLAGS, "--retry-errors", log=self.log)
            if (code := running.wait()) != 0:
                self.problems.append(f"running the errors again ended with {code}")
        finally:
            if running is not None:
                running.process.kill()
                running.process.wait()

    def _wait(self, name: str, running: RunBatch) -> None:
        longest = LONGEST_PAUSE_SECONDS
        if name == STARTING:
            longest = LONGEST_START_SECONDS
        else:
            number = running.num_records() + self._random.randint(*RECORDS_BETWEEN)
            running.wait_for_records(number)
        time.sleep(self._random.uniform(0, longest))

    def _strike(self, name: str, running: RunBatch) -> bool:
        """Returns whether the job's process still runs."""
        if name == "rank killed":
            self._kill_rank(running)
            running.wait_for_records(running.num_records() + 1)
            return True
        if name in ("process killed", STARTING):
            running.process.kill()
            running.wait()
            return False
        filler = fill(self._disk, self._random.randrange(3) * os.sysconf("SC_PAGE_SIZE"))
        code = running.wait()
        last = running.log.read_text().splitlines()[-1]
        if code != 1 or "No space left on device" not in last:
            self.problems.append(f"on a full disk the job ended with {code}: {last}")
        filler.unlink()
        return False

    def _kill_rank(self, running: RunBatch) -> None:
        while running.process.poll() is None:
            if ranks := running.rank_processes():
                with suppress(psutil.NoSuchProcess):  # its engine was just being ended
                    self._random.choice(ranks).kill()
                    return
            time.sleep(0.1)  # the engine is being started again

    def _look(self) -> int:
        """How many whole records there are; all that were there before must be."""
        path = self._disk / "out"
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self.torn_ends += len(whole) < len(content)
        if not whole.startswith(self._finished):
            self.problems.append(f"a record was lost after event {len(self.events)}")
        self._finished = whole
        return whole.count(b"\n")


def answers(output: Path) -> tuple[dict[str, Any], int]:
    """What was answered to each custom_id, and how many records there are."""
    found = records(output)
    by_id = {}
    for entry in found:
        body = entry["response"]["body"]
        choices = [choice.get("text", choice.get("message")) for choice in body.get("choices", [])]
        by_id[entry["custom_id"]] = [
            entry["response"]["status_code"],
            choices,
            body.get("usage"),
            body.get("error"),
        ]
    return by_id, len(found)


def undisturbed(folder: Path, lines: list[dict[str, Any]]) -> dict[str, Any]:
    folder.mkdir()
    write_lines(folder / "in", lines)
    with run_batch(folder, *FLAGS[2:]) as running:
        assert running.wait() == 0, running.log.read_text()
    return answers(folder / "out")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    lines = [
        *demo_lines(NUM_SUMS, seed),
        line("too long", "1+" * 3000),
        line("hot", temperature=-1),
    ]
    random.Random(seed).shuffle(lines)
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="kills-") as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        folder = Path(name)
        (folder / "traces").mkdir()
        traces = Traces(patch, folder / "traces")
        with small_disk(folder / "disk") as disk:
            write_lines(disk / "in", lines)
            kills = Kills(disk, seed, traces)
            kills.run()
            found, number = answers(disk / "out")
            log = kills.log.read_text()
        expected = undisturbed(folder / "undisturbed", lines)
        try:
            traces.assert_nothing_left(CLEAN_SECONDS)
        except AssertionError as error:
            kills.problems.append(f"left on the machine: {error}")
    if number != len(lines) or found.keys() != expected.keys():
        kills.problems.append(f"{number} records of {len(found)} ids for {len(lines)} requests")
    if wrong := [name for name in expected if found.get(name) != expected[name]]:
        kills.problems.append(f"{len(wrong)} answers differ, {wrong[0]} among them")
    result = {
        "seed": seed,
        "requests": len(lines),
        "records": number,
        "events": kills.events,
        "torn_ends_repaired": kills.torn_ends,
        "engine_restarts": log.count("starting the engine again"),
        "seconds": round(time.monotonic() - started),
        "problems": kills.problems,
    }
    record("kills", result)
    print(*kills.problems[:20], sep="\n")
    print(
        f"kills: {len(kills.events)} ends, {number} records of {len(lines)} requests, "
        f"{len(kills.problems) or 'no'} problems"
    )
    sys.exit(bool(kills.problems) or len(kills.events) < sum(NUM_EVENTS.values()))


if __name__ == "__main__":
    main()

"""What a job shows: lines off a terminal, a bar on one, a summary."""

import io

from sidp_sgl.batch.files.records import Answer
from sidp_sgl.batch.progress import EngineStatus, Progress, Tally


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def work(tally: Tally, clock: Clock, progress: Progress, seconds: int) -> None:
    """Five requests of ten tokens per second."""
    for _ in range(seconds):
        clock.now += 1.0
        for _ in range(5):
            tally.count(Answer(1, 200, b"{}", 3, 10))
        tally.status = EngineStatus({"was": 90, "cas": 10}, 0.5)
        progress.tick()


def test_lines() -> None:
    """A line every half minute: speed, time left, modes, KV."""
    text, clock = io.StringIO(), Clock()
    tally = Tally(num_requests=1000, num_before=100)
    progress = Progress(tally, text, clock)
    progress.tick()
    work(tally, clock, progress, 61)
    first, second, third = text.getvalue().splitlines()
    assert first == "sidp-sgl run-batch: waiting for the engine"
    assert second.startswith("sidp-sgl run-batch: 255 of 1,000 (25.5%), 52 tokens/s")
    assert third.endswith("51 tokens/s, 01:59 left, WaS 90% CaS 10%, KV 50%")


def test_a_bar() -> None:
    text, clock = Terminal(), Clock()
    tally = Tally(num_requests=1000, num_before=100)
    progress = Progress(tally, text, clock)
    work(tally, clock, progress, 10)
    progress.say("starting the engine again")
    progress.close()
    shown = text.getvalue()
    assert (
        "15%|" in shown and "150 of 1000, 56 tokens/s, 02:50 left, WaS 90% CaS 10%, KV 50%" in shown
    )
    assert "sidp-sgl run-batch: starting the engine again\n" in shown


def test_the_summary_counts_all_engines() -> None:
    clock = Clock()
    tally = Tally(num_requests=1000, num_before=100)
    progress = Progress(tally, io.StringIO(), clock)
    work(tally, clock, progress, 10)
    tally.engine_ended()
    assert tally.status.kv_use is None
    tally.restarts = 1
    tally.status = EngineStatus({"cas": 50, "local": 50}, None)
    assert progress.summary(num_errors=7) == (
        "150 of 1,000 requests done, 50 in this run, 7 of them error records, "
        "150 prompt and 500 output tokens, 56 tokens/s, WaS 45% CaS 30% local 25%, "
        "1 restarts of the engine"
    )


def test_a_run_with_nothing_to_do() -> None:
    progress = Progress(Tally(num_requests=10, num_before=10), io.StringIO())
    assert progress.summary(0).startswith("10 of 10 requests done, 0 in this run, 0 prompt")

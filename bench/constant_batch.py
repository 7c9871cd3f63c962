"""Decode steps at a constant batch size: their time as the engine itself measures it, their modes.

SGLang notes the mean time of every few decode steps beside the batch size (`step_time_dict`); the
time of a run is the median of these windows.
"""

import statistics
from dataclasses import dataclass
from typing import Any

from bench.demo_job import make_prompts
from bench.offline import JobResult
from bench.side import Side

INPUT_TOKENS = 32
ENVIRONMENT = {"SGLANG_RECORD_STEP_TIME": "1"}
KEYWORDS = {"decode_log_interval": 4}  # steps per window


@dataclass(frozen=True)
class Steps:
    """A run's decode steps, and what the ranks' statuses say of it (0 and empty in plain DP)."""

    seconds: float  # of one step; mean over the ranks
    cpu_seconds: float  # of the whole run and all the engine's processes
    was_steps: int  # of all ranks, prefill steps among them
    cas_steps: int
    switches: int
    thresholds: list[int | None]  # of every rank, after the run

    @property
    def cas_share(self) -> float:
        return self.cas_steps / max(1, self.was_steps + self.cas_steps)


def run_steps(side: Side, batch_size: int, num_steps: int, ranks: list[int], seed: int) -> Steps:
    """Each of `ranks` runs `batch_size` requests of equal length. `side` must have been started
    with ENVIRONMENT and KEYWORDS. Where the last requests joined when the first ones were nearly
    through, so that no window was whole, the run is done again with twice the steps."""
    for factor in (1, 2, 4):
        before = side.states()
        job = run_batch(side, batch_size, factor * num_steps, ranks, seed)
        after = side.states()
        windows = [
            new
            for a, b in zip(before, after, strict=True)
            if (new := new_windows(a, b, batch_size))
        ]
        if len(windows) == len(set(ranks)):
            return _steps(before, after, windows, job.cpu_seconds)
    raise RuntimeError(f"too few steps at batch {batch_size}: let them be more")


def _steps(
    before: list[dict[str, Any]],
    after: list[dict[str, Any]],
    windows: list[list[float]],
    cpu_seconds: float,
) -> Steps:
    old, new = ([state.get("sidp", {}) for state in states] for states in (before, after))
    was, cas = (_iterations(new, mode) - _iterations(old, mode) for mode in ("was", "cas"))
    return Steps(
        statistics.fmean(map(statistics.median, windows)),
        cpu_seconds,
        was,
        cas,
        sum(status.get("mode_switches", 0) for status in new)
        - sum(status.get("mode_switches", 0) for status in old),
        [status["batch_threshold"] for status in new if status],
    )


def run_batch(
    side: Side, batch_size: int, num_steps: int, ranks: list[int], seed: int
) -> JobResult:
    placed = [rank for rank in ranks for _ in range(batch_size)]
    prompts = make_prompts(len(placed), INPUT_TOKENS, seed)
    sampling = {"temperature": 0, "max_new_tokens": num_steps, "ignore_eos": True}
    return side.run(prompts, sampling, ranks=placed)


def _iterations(statuses: list[dict[str, Any]], mode: str) -> int:
    return sum(status["iterations"][mode] for status in statuses if status)


def new_windows(before: dict[str, Any], after: dict[str, Any], batch_size: int) -> list[float]:
    """Seconds per step, of one rank. The first window may begin in the prefill or before it."""
    return _windows(after, batch_size)[len(_windows(before, batch_size)) + 1 :]


def _windows(state: dict[str, Any], batch_size: int) -> list[float]:
    times = state["step_time_dict"]
    return times.get(batch_size, times.get(str(batch_size), []))

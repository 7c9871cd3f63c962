"""How far a job is, for who watches: a bar on a terminal, else a line now and then.

Everything goes to stderr.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TextIO

from tqdm import tqdm

from sidp_sgl.batch.files.records import Answer

_LINE_SECONDS = 30.0
_BAR_SECONDS = 0.5
_RECENT_SECONDS = 60.0  # the time left follows from the speed of the last minute


class EngineStatus(NamedTuple):
    """What the engine says of itself from time to time."""

    iterations: dict[str, int]  # by mode, of all ranks, since its start; empty without --sidp
    kv_use: float | None  # share of the KV tokens in use, mean over the ranks


NO_STATUS = EngineStatus({}, None)
MODES = {"was": "WaS", "cas": "CaS", "local": "local"}


@dataclass
class Tally:
    """What this run of the job has done."""

    num_requests: int  # of the whole job
    num_before: int  # done by earlier runs
    finished: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    restarts: int = 0
    status: EngineStatus = NO_STATUS
    _iterations_before: dict[str, int] = field(default_factory=dict)  # of engines that have ended
    _recent: list[tuple[float, int]] = field(default_factory=list)  # time, finished

    def count(self, answer: Answer) -> None:
        self.finished += 1
        self.errors += answer.is_error
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens

    def engine_ended(self) -> None:
        self._iterations_before = self.iterations
        self.status = NO_STATUS

    @property
    def iterations(self) -> dict[str, int]:
        """By mode, of all engines of this run."""
        parts = self._iterations_before, self.status.iterations
        return {mode: sum(part.get(mode, 0) for part in parts) for mode in MODES}

    @property
    def num_done(self) -> int:
        return self.num_before + self.finished

    def seconds_left(self, now: float) -> float | None:
        """By the speed of the last minute; None where nothing has finished in it."""
        self._recent.append((now, self.finished))
        while now - self._recent[0][0] > _RECENT_SECONDS and len(self._recent) > 2:
            self._recent.pop(0)
        since, finished = self._recent[0]
        speed = (self.finished - finished) / (now - since) if now > since else 0.0
        return (self.num_requests - self.num_done) / speed if speed else None

    def mode_mix(self) -> str | None:
        """Shares of the steps; None without --sidp."""
        iterations = self.iterations
        total = sum(iterations.values())
        shown = [mode for mode in MODES if mode != "local" or iterations[mode]]
        shares = [f"{MODES[mode]} {iterations[mode] / total:.0%}" for mode in shown if total]
        return " ".join(shares) or None


class Progress:
    """Shows a tally; `start` is when the first engine begins to work."""

    def __init__(
        self,
        tally: Tally,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tally = tally
        self._stream = stream or sys.stderr
        self._clock = clock
        self._started: float | None = None
        self._shown = float("-inf")
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=tally.num_requests,
                initial=tally.num_done,
                unit="request",
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt}{postfix}",
            )

    def tick(self) -> None:
        """Show where it is time to."""
        now = self._clock()
        if self._started is None and self.tally.finished:
            self._started = self._shown = now
        if now - self._shown < (_LINE_SECONDS if self._bar is None else _BAR_SECONDS):
            return
        self._shown = now
        if self._started is None:
            self.say("waiting for the engine") if self._bar is None else None
        elif self._bar is not None:
            self._bar.n = self.tally.num_done
            self._bar.set_postfix_str(self._details(now))
        else:
            tally = self.tally
            done = f"{tally.num_done:,} of {tally.num_requests:,}"
            share = tally.num_done / tally.num_requests
            self.say(f"{done} ({share:.1%}), {self._details(now)}")

    def _details(self, now: float) -> str:
        tally = self.tally
        left = tally.seconds_left(now)
        kv_use = tally.status.kv_use
        parts = [
            f"{self.tokens_per_second(now):,.0f} tokens/s",
            None if left is None else f"{tqdm.format_interval(left)} left",
            f"{tally.errors:,} errors" if tally.errors else None,
            tally.mode_mix(),
            None if kv_use is None else f"KV {kv_use:.0%}",
        ]
        return ", ".join(part for part in parts if part)

    def tokens_per_second(self, now: float | None = None) -> float:
        """Output tokens, since the first request has finished."""
        if self._started is None:
            return 0.0
        elapsed = (self._clock() if now is None else now) - self._started
        return self.tally.completion_tokens / elapsed if elapsed > 0 else 0.0

    def say(self, text: str) -> None:
        """A line of its own, beside the bar."""
        tqdm.write(f"sidp-sgl run-batch: {text}", file=self._stream)
        self._stream.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.n = self.tally.num_done
            self._bar.close()
            self._bar = None

    def summary(self, num_errors: int) -> str:
        """`num_errors`: error records of the whole output, also of earlier runs."""
        tally = self.tally
        parts = [
            f"{tally.num_done:,} of {tally.num_requests:,} requests done",
            f"{tally.finished:,} in this run" if tally.num_before else None,
            f"{num_errors:,} of them error records" if num_errors else None,
            f"{tally.prompt_tokens:,} prompt and {tally.completion_tokens:,} output tokens",
            f"{self.tokens_per_second():,.0f} tokens/s",
            tally.mode_mix(),
            f"{tally.restarts} restarts of the engine" if tally.restarts else None,
        ]
        return ", ".join(part for part in parts if part)

"""Runs one offline job on a real engine and measures what the demo and the benches show."""

import asyncio
import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sglang
from sglang.srt.managers.load_snapshot import ShmLoadSnapshotReader, shm_path_for

SAMPLE_SECONDS = 0.02
_SEMAPHORES = f"sidp-bench-{os.getpid()}"


@dataclass(frozen=True)
class JobResult:
    """Outputs in the order of the prompts, and what the job took."""

    outputs: list[Any]  # text, or token ids where the engine has no tokenizer
    seconds: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    mean_batch: float  # running requests per rank, averaged over the time it had any
    idle_share: float  # of the ranks' time, without a request
    batches: list[tuple[float, float]]  # time since the start, running requests per rank
    statuses: list[tuple[float, list[dict[str, Any]]]]  # time, every rank's `sidp` dictionary

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens


class BatchSampler:
    """Reads the ranks' running batch sizes from SGLang's load snapshots, disturbing nobody."""

    def __init__(self, engine: sglang.Engine, num_ranks: int) -> None:
        path = shm_path_for(engine.port_args.instance_id)
        self._reader = ShmLoadSnapshotReader(path, num_ranks)
        self.samples: list[tuple[float, list[int]]] = []  # time since the start, of every rank
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        started = time.perf_counter()
        while not self._stop.wait(SAMPLE_SECONDS):
            running = [load.num_running_reqs for load in self._reader.read_all()]
            self.samples.append((time.perf_counter() - started, running))

    def __enter__(self) -> "BatchSampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def mean(self) -> float:
        busy = [size for _, running in self.samples for size in running if size]
        return sum(busy) / max(1, len(busy))

    @property
    def idle_share(self) -> float:
        """Ranks without a request, on average from the first to the last sample that has any."""
        busy = [n for n, (_, running) in enumerate(self.samples) if any(running)]
        counted = [running for _, running in self.samples[busy[0] : busy[-1] + 1]] if busy else []
        sizes = [size for running in counted for size in running]
        return sum(size == 0 for size in sizes) / max(1, len(sizes))

    @property
    def means(self) -> list[tuple[float, float]]:
        """Running requests per rank over time, idle ranks among them."""
        return [(when, sum(running) / len(running)) for when, running in self.samples]


def start_engine(**keywords: Any) -> sglang.Engine:
    """An engine, on CPU ranks unless `device` says otherwise; end it with `shut_down`."""
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    prefix = config["semprefix"]
    config["semprefix"] = f"/{_SEMAPHORES}"  # inherited by the ranks
    try:
        return sglang.Engine(**{"device": "cpu", "log_level": "error", **keywords})
    finally:
        config["semprefix"] = prefix


def shut_down(engine: sglang.Engine) -> None:
    """`engine.shutdown()`, and away with what plain SGLang leaves in /dev/shm: its load snapshot,
    and the semaphores of the ranks that it kills."""
    engine.shutdown()
    Path(shm_path_for(engine.port_args.instance_id)).unlink(missing_ok=True)
    for path in Path("/dev/shm").glob(f"sem.{_SEMAPHORES}-*"):
        path.unlink(missing_ok=True)


def run_job(
    engine: sglang.Engine,
    num_ranks: int,
    prompts: Sequence[Any],
    sampling: dict[str, Any] | Sequence[dict[str, Any]],
    on_finished: Callable[[], None] = lambda: None,
    ranks: Sequence[int] | None = None,
    status_seconds: float | None = None,
) -> JobResult:
    """All prompts (texts, or lists of token ids) at once; `on_finished` after each.

    `ranks`: the rank of every prompt, or None where SGLang chooses; `status_seconds`: how often
    the ranks' statuses are asked for meanwhile, or None where they are not.
    """
    statuses: list[tuple[float, list[dict[str, Any]]]] = []

    async def one(index: int) -> dict[str, Any]:
        prompt = prompts[index]
        key = "prompt" if isinstance(prompt, str) else "input_ids"
        params = sampling if isinstance(sampling, dict) else sampling[index]
        rank = None if ranks is None else ranks[index]
        output = await engine.async_generate(
            **{key: prompt}, sampling_params=params, routed_dp_rank=rank
        )
        on_finished()
        return output

    async def watch(seconds: float, finished: asyncio.Event) -> None:
        is_last = False
        while not is_last:
            is_last = finished.is_set()
            states = await engine.tokenizer_manager.get_internal_state()
            now = time.perf_counter() - started
            statuses.append((now, [state.get("sidp", {}) for state in states]))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(finished.wait(), seconds)

    async def everything() -> tuple[list[dict[str, Any]], float]:
        finished = asyncio.Event()
        watching = [] if status_seconds is None else [watch(status_seconds, finished)]
        watcher = asyncio.gather(*watching)
        outputs = await asyncio.gather(*(one(index) for index in range(len(prompts))))
        seconds = time.perf_counter() - started
        finished.set()
        await watcher
        return outputs, seconds

    with BatchSampler(engine, num_ranks) as sampler:
        started = time.perf_counter()
        outputs, seconds = engine.loop.run_until_complete(everything())
    return JobResult(
        [output["text"] if "text" in output else output["output_ids"] for output in outputs],
        seconds,
        *(
            sum(output["meta_info"][name] for output in outputs)
            for name in ("completion_tokens", "prompt_tokens", "cached_tokens")
        ),
        sampler.mean,
        sampler.idle_share,
        sampler.means,
        statuses,
    )

"""Runs one offline job on a real engine and measures what the demo and the benches show."""

import asyncio
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
        self._sum = self._count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            for load in self._reader.read_all():
                if load.num_running_reqs:
                    self._sum += load.num_running_reqs
                    self._count += 1

    def __enter__(self) -> "BatchSampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def mean(self) -> float:
        return self._sum / max(1, self._count)


def start_engine(**keywords: Any) -> sglang.Engine:
    """An engine on CPU ranks; end it with `shut_down`."""
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    prefix = config["semprefix"]
    config["semprefix"] = f"/{_SEMAPHORES}"  # inherited by the ranks
    try:
        return sglang.Engine(device="cpu", log_level="error", **keywords)
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
) -> JobResult:
    """All prompts (texts, or lists of token ids) at once; `on_finished` after each."""

    async def one(index: int) -> dict[str, Any]:
        prompt = prompts[index]
        key = "prompt" if isinstance(prompt, str) else "input_ids"
        params = sampling if isinstance(sampling, dict) else sampling[index]
        output = await engine.async_generate(**{key: prompt}, sampling_params=params)
        on_finished()
        return output

    async def everything() -> list[dict[str, Any]]:
        return await asyncio.gather(*(one(index) for index in range(len(prompts))))

    with BatchSampler(engine, num_ranks) as sampler:
        started = time.perf_counter()
        outputs = engine.loop.run_until_complete(everything())
        seconds = time.perf_counter() - started
    return JobResult(
        [output["text"] if "text" in output else output["output_ids"] for output in outputs],
        seconds,
        *(
            sum(output["meta_info"][name] for output in outputs)
            for name in ("completion_tokens", "prompt_tokens", "cached_tokens")
        ),
        sampler.mean,
    )

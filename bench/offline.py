"""Runs offline jobs on a real engine and measures what the demo and the benches show.

As a program it is the far end of a `bench.side.Side`: an engine that obeys a connection. There it
may measure another tree's `sidp_sgl`, so this file imports nothing of the project.
"""

import asyncio
import contextlib
import importlib.util
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import sglang

SAMPLE_SECONDS = 0.02
_SEMAPHORES = f"sidp-bench-{os.getpid()}"


@dataclass(frozen=True)
class JobResult:
    """Outputs in the order of the prompts, and what the job took."""

    outputs: list[Any]  # text, or token ids where the engine has no tokenizer
    seconds: float
    cpu_seconds: float  # of all the engine's processes
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

    def __init__(self, engine: "sglang.Engine", num_ranks: int) -> None:
        from sglang.srt.managers.load_snapshot import ShmLoadSnapshotReader, shm_path_for

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


def start_engine(**keywords: Any) -> "sglang.Engine":
    """An engine, on CPU ranks unless `device` says otherwise; end it with `shut_down`."""
    import sglang

    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    prefix = config["semprefix"]
    config["semprefix"] = f"/{_SEMAPHORES}"  # inherited by the ranks
    try:
        return sglang.Engine(**{"device": "cpu", "log_level": "error", **keywords})
    finally:
        config["semprefix"] = prefix


def shut_down(engine: "sglang.Engine") -> None:
    """`engine.shutdown()`, and away with what plain SGLang leaves in /dev/shm: its load snapshot,
    and the semaphores of the ranks that it kills."""
    from sglang.srt.managers.load_snapshot import shm_path_for

    engine.shutdown()
    _remove([Path(shm_path_for(engine.port_args.instance_id))])


def _remove(segments: Iterable[Path]) -> None:
    for path in [*segments, *Path("/dev/shm").glob(f"sem.{_SEMAPHORES}-*")]:
        with contextlib.suppress(OSError):  # gone, or an anonymous file, as with --sidp
            path.unlink()


def run_job(
    engine: "sglang.Engine",
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
        cpu_before, started = _cpu_seconds(), time.perf_counter()
        outputs, seconds = engine.loop.run_until_complete(everything())
        cpu_seconds = _cpu_seconds() - cpu_before
    return JobResult(
        [output["text"] if "text" in output else output["output_ids"] for output in outputs],
        seconds,
        cpu_seconds,
        *(
            sum(output["meta_info"][name] for output in outputs)
            for name in ("completion_tokens", "prompt_tokens", "cached_tokens")
        ),
        sampler.mean,
        sampler.idle_share,
        sampler.means,
        statuses,
    )


def _cpu_seconds() -> float:
    """That this process and all that it has started have had so far."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def serve(pipe: Connection) -> None:
    """The first message holds the engine's keywords; answered is which `sidp_sgl` it has. Then
    jobs, states and updates, until None comes or the other end goes away."""
    watch = threading.Thread(target=_end_with, args=(pipe,), daemon=True)
    watch.start()
    try:
        keywords = pipe.recv()
        engine = start_engine(**keywords)
        spec = importlib.util.find_spec("sidp_sgl")
        pipe.send(spec and spec.origin)
        while (request := pipe.recv()) is not None:
            try:
                answer = _answer(engine, keywords["dp_size"], *request)
            except Exception as error:
                answer = RuntimeError(str(error))
            pipe.send(answer)
        shut_down(engine)
    except Exception as error:  # not started, or the other end is gone
        with contextlib.suppress(OSError):
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
        watch.join()


def _answer(engine: "sglang.Engine", num_ranks: int, what: str, *given: Any) -> Any:
    if what == "states":
        return engine.get_server_info()["internal_states"]
    if what == "update":
        from sglang.srt.managers.io_struct import SetInternalStateReq

        answers = engine.tokenizer_manager.set_internal_state(
            SetInternalStateReq(server_args=given[0])
        )
        return engine.loop.run_until_complete(answers)
    engine.flush_cache()
    prompts, sampling, options = given
    return vars(run_job(engine, num_ranks, prompts, sampling, **options))


def apart(main: Callable[[], int]) -> int:
    """The exit code of `main`, which runs in a fork: when this process is killed, that one ends and
    leaves nothing of its engine. To be called before SGLang is imported."""
    near, far = socket.socketpair()
    child = os.fork()
    if child == 0:
        near.close()
        threading.Thread(target=_end_with, args=(far,), daemon=True).start()
        return main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's reaches both
    far.close()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _end_with(pipe: Connection | socket.socket) -> None:
    """End this process when the other end of `pipe` goes away, whatever it is doing then."""
    poll = select.poll()
    poll.register(pipe.fileno(), select.POLLRDHUP)
    poll.poll()
    processes = psutil.Process().children(recursive=True)
    segments: set[Path] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            mapped = {Path(each.path) for each in process.memory_maps()}
            segments.update(path for path in mapped if path.parent == Path("/dev/shm"))
            process.kill()
    psutil.wait_procs(processes, 60)
    _remove(segments)
    os._exit(1)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))

"""Measures, once at start, what the mode policy begins with: fetch time and step times.

The steps are SGLang's own dummy decode steps, with weights that happen to lie in the slots: their
values don't matter, their times do.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from sidp_sgl.scheduler.modes.times import StepTimes
from sidp_sgl.weightpool.execution import UnitExecution
from sidp_sgl.weightpool.pool import WeightPool

logger = logging.getLogger(__name__)
CONTEXT_TOKENS = 128  # of a dummy request; what longer ones take is learnt while running
_REPEATS = 3


def calibrate(scheduler: Any, pool: WeightPool, execution: UnitExecution) -> StepTimes:
    """Fetch time of a step's layers, and compute time at batches of 1, 2, 4, … that may be sent."""
    assert execution.requester is not None
    _fetch_all(pool)  # not timed: some layers lie in their slots already
    fetch_seconds = _best(lambda: _fetch_all(pool), time.perf_counter)
    # On CPUs ranks may share cores, and all calibrate at the same time.
    is_cpu = scheduler.tp_worker.model_runner.device == "cpu"
    compute_clock = time.thread_time if is_cpu else time.perf_counter
    runner = scheduler.tp_worker.model_runner.eager_runner
    largest = min(execution.requester.staging.rows_per_rank, runner._eager_max_bs)
    with _context_length(scheduler.tp_worker.model_runner.attn_backend):
        buffers = runner._alloc_dummy_decode_buffers(largest)
    compute_seconds, size = {}, 1
    with execution.weights_as_they_are():
        while size <= largest:
            step = partial(runner._dummy_run, batch_size=size, buffers=buffers)
            compute_seconds[size] = _best(step, compute_clock, pool.transport.synchronize)
            size *= 2
    logger.info(
        "sidp: fetching all layers takes %.1f ms, a step %s",
        fetch_seconds * 1e3,
        ", ".join(f"{t * 1e3:.1f} ms at batch {n}" for n, t in compute_seconds.items()),
    )
    return StepTimes(fetch_seconds, compute_seconds)


@contextmanager
def _context_length(attention_backend: Any) -> Iterator[None]:
    """Let dummy requests have a context of CONTEXT_TOKENS; backends say 0, 1, or nothing."""
    attention_backend.get_cuda_graph_seq_len_fill_value = lambda: CONTEXT_TOKENS
    try:
        yield
    finally:
        del attention_backend.get_cuda_graph_seq_len_fill_value


def _fetch_all(pool: WeightPool) -> None:
    for block in range(len(pool.placement.blocks)):
        pool.enter(block)
        pool.leave(block)
    pool.transport.synchronize()


def _best(
    run: Callable[[], Any],
    clock: Callable[[], float],
    synchronize: Callable[[], None] = lambda: None,
) -> float:
    """Seconds of the fastest of a few runs, by `clock`; `synchronize` ends each."""
    times = []
    for _ in range(_REPEATS):
        started = clock()
        run()
        synchronize()
        times.append(clock() - started)
    return min(times)

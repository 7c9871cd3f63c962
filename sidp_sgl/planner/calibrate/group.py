"""The ranks of a calibration: one process each, all measuring the same at the same time.

A rank that fails ends all, with its reason; every wait is bounded.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
import uuid
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from statistics import fmean
from typing import Any
from unittest.mock import patch

from sidp_sgl.errors import SidpError
from sidp_sgl.planner.calibrate.points import (
    CallPoint,
    CollectivePoint,
    FetchPoint,
    GemmPoint,
    OverlapPoint,
    RankPoints,
)
from sidp_sgl.planner.calibrate.rank import RankMeasuring, RankTask
from sidp_sgl.planner.models import ModelShape
from sidp_sgl.sglang_hooks.cpu.cores import plan_cores

TIMEOUT_SECONDS = 900.0
POINT_SECONDS = 0.06


def measure_ranks(
    device: str,
    shape: ModelShape,
    num_ranks: int,
    link_gbps: float | None,
    point_seconds: float = POINT_SECONDS,
) -> RankPoints:
    """The mean of what all ranks measured. Raises SidpError with the reason of a rank."""
    context = multiprocessing.get_context("spawn")
    meeting = f"calibration-{uuid.uuid4().hex}"
    cores = plan_cores(sorted(os.sched_getaffinity(0)), num_ranks)
    barrier = context.Barrier(num_ranks)
    pipes, processes = [], []
    # Every thread of a rank asks for its number of threads anew: as in an engine, none has more
    # than the rank has cores.
    folder = tempfile.TemporaryDirectory(prefix="sidp-calibration-")
    with patch.dict(os.environ, OMP_NUM_THREADS=str(len(cores[0]))):
        for rank in range(num_ranks):
            task = RankTask(
                device,
                shape,
                rank,
                num_ranks,
                tuple(cores[rank]),
                link_gbps,
                meeting,
                os.path.join(folder.name, "store"),
                point_seconds,
            )
            pipe, child = context.Pipe()
            process = context.Process(target=_run, args=(task, barrier, child), daemon=True)
            process.start()
            child.close()
            pipes.append(pipe)
            processes.append(process)
    try:
        return mean_points(_answers(pipes))
    finally:
        for process in processes:
            process.kill()
            process.join()
        folder.cleanup()


def _run(task: RankTask, barrier: Barrier, pipe: Connection) -> None:
    try:
        pipe.send(RankMeasuring(task, barrier).run())
    except BaseException as error:
        reason = traceback.format_exception_only(error)[-1].strip()
        pipe.send(SidpError(f"rank {task.rank} could not measure: {reason}"))


def _answers(pipes: Sequence[Connection]) -> list[RankPoints]:
    """By rank; the first failure is raised."""
    answers: dict[int, RankPoints] = {}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(answers) < len(pipes):
        waiting = {id(pipe): rank for rank, pipe in enumerate(pipes) if rank not in answers}
        ready = wait([pipes[rank] for rank in waiting.values()], deadline - time.monotonic())
        if not ready:
            raise SidpError(f"the ranks did not end measuring within {TIMEOUT_SECONDS:.0f} s")
        for pipe in ready:
            rank = waiting[id(pipe)]
            try:
                answer = pipes[rank].recv()
            except EOFError:
                raise SidpError(f"rank {rank} ended while measuring: out of memory?") from None
            if isinstance(answer, Exception):
                raise answer
            answers[rank] = answer
    return [answers[rank] for rank in range(len(pipes))]


def mean_points(ranks: Sequence[RankPoints]) -> RankPoints:
    """All ranks have the same points; their seconds are averaged, one by one."""

    def mean(kind: Any, lists: Sequence[list[Any]]) -> list[Any]:
        return [kind(*map(_mean, zip(*same, strict=True))) for same in zip(*lists, strict=True)]

    return RankPoints(
        mean(GemmPoint, [rank.gemms for rank in ranks]),
        mean(FetchPoint, [rank.fetches for rank in ranks]),
        fmean(rank.copy_rate for rank in ranks),
        mean(OverlapPoint, [rank.overlaps for rank in ranks]),
        mean(CallPoint, [rank.calls for rank in ranks]),
        mean(CollectivePoint, [rank.collectives for rank in ranks]),
    )


def _mean(values: Sequence[float]) -> float:
    """Whole numbers say what was measured, and are alike."""
    return values[0] if isinstance(values[0], int) else fmean(values)

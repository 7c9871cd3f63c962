"""What is measured at start, on a stand-in for SGLang's runner and a real, paced pool."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sidp_sgl.scheduler.modes.policy import WAS
from sidp_sgl.scheduler.modes.times import StepTimes
from sidp_sgl.sglang_hooks.step.calibration import CONTEXT_TOKENS, calibrate
from sidp_sgl.weightpool.execution import UnitExecution
from sidp_sgl.weightpool.placement import Placement
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.transport.shm.transport import ShmTransport
from tests.support.pools import Group, RankUnderTest, layer_bytes, run_group

FETCH_SECONDS = 0.04  # of one layer; far above the pauses of a busy machine
REQUESTER: Any = SimpleNamespace(staging=SimpleNamespace(rows_per_rank=64))


class Runner:
    """SGLang's dummy decode steps; each takes as many milliseconds as `milliseconds` says."""

    def __init__(
        self, largest: int, milliseconds: Callable[[int], float], device: str = "cuda"
    ) -> None:
        self._eager_max_bs = largest
        self._milliseconds = milliseconds
        self.attention = SimpleNamespace()
        self.sizes: list[int] = []
        self.execution: UnitExecution | None = None
        self.scheduler = SimpleNamespace(
            tp_worker=SimpleNamespace(
                model_runner=SimpleNamespace(
                    eager_runner=self, attn_backend=self.attention, device=device
                )
            )
        )

    def _alloc_dummy_decode_buffers(self, max_bs: int) -> Any:
        return max_bs, self.attention.get_cuda_graph_seq_len_fill_value()

    def _dummy_run(self, *, batch_size: int, buffers: Any) -> None:
        assert buffers == (min(64, self._eager_max_bs), CONTEXT_TOKENS)
        assert self.execution is not None and not self.execution._uses_pool
        self.sizes.append(batch_size)
        time.sleep(self._milliseconds(batch_size) / 1e3)


def calibrated(group: Group, runners: list[Runner]) -> list[StepTimes]:
    """Every rank calibrates, all at the same time."""
    results: dict[int, StepTimes] = {}
    start = threading.Barrier(group.num_ranks)
    end = threading.Barrier(group.num_ranks)

    def script(rank: RankUnderTest) -> None:
        number = rank.pool.rank
        runner = runners[number]
        runner.execution = UnitExecution(rank.pool, REQUESTER)
        time.sleep(0.1)  # the slots are full by then, as they are when a model has been loaded
        start.wait()
        results[number] = calibrate(runner.scheduler, rank.pool, runner.execution)
        assert runner.execution._uses_pool
        rank.run_steps(2)  # the pool goes on as if nothing had been
        assert rank.wrong == [] and rank.pool.prefetcher.counters.resyncs == 0
        end.wait()

    rate = layer_bytes(0) / FETCH_SECONDS
    run_group(group, script, lambda rank: ShmTransport(rate))
    return [results[number] for number in range(group.num_ranks)]


def test_fetch_time_is_that_of_all_layers_also_of_those_prefetched_before() -> None:
    for times in calibrated(Group(2, 8), [Runner(4, lambda n: 0.0) for _ in range(2)]):
        # Half of it, were the first pass timed; less than all, where a pause lies between passes.
        assert 0.7 * 4 * FETCH_SECONDS < times.fetch_seconds < 4 * 4 * FETCH_SECONDS


def test_layers_that_stay_in_their_slots_take_no_time() -> None:
    group = Group(2, 4, num_slots=2)
    for times in calibrated(group, [Runner(4, lambda n: 0.0) for _ in range(2)]):
        assert times.fetch_seconds < FETCH_SECONDS / 2


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, [1]), (20, [1, 2, 4, 8, 16]), (500, [1, 2, 4, 8, 16, 32, 64])]
)
def test_steps_are_timed_at_growing_batch_sizes(largest: int, sizes: list[int]) -> None:
    runners = [Runner(largest, lambda size: 1.0 + 0.2 * size) for _ in range(2)]
    for runner, times in zip(runners, calibrated(Group(2, 2), runners), strict=True):
        assert sorted(set(runner.sizes)) == sizes
        for size in sizes:
            assert times.step_seconds("was", size) >= (1.0 + 0.2 * size) / 1e3
        assert not hasattr(runner.attention, "get_cuda_graph_seq_len_fill_value")


def test_a_disturbed_run_does_not_set_the_time() -> None:
    disturbed = iter([400.0, 1.0, 1.0] * 2)
    runner = Runner(1, lambda size: next(disturbed))
    (times, _) = calibrated(Group(2, 2), [runner, Runner(1, lambda size: 0.0)])
    assert times.step_seconds("was", 1) < 0.3


def test_units_use_the_pool_again_where_a_step_failed() -> None:
    runner = Runner(4, lambda size: 1 / 0)
    pool = WeightPool(ShmTransport(), 0, Placement(2))
    runner.execution = UnitExecution(pool, REQUESTER)
    with pytest.raises(ZeroDivisionError):
        calibrate(runner.scheduler, pool, runner.execution)
    assert runner.execution._uses_pool


def test_on_cpus_steps_are_timed_without_the_waits_for_a_core() -> None:
    """Ranks that share cores calibrate at the same time: a sleep stands for such a wait."""
    runner = Runner(1, lambda n: 20.0, device="cpu")
    pool = WeightPool(ShmTransport(), 0, Placement(2))
    runner.execution = UnitExecution(pool, REQUESTER)
    times = calibrate(runner.scheduler, pool, runner.execution)
    assert times.step_seconds(WAS, 1) < 0.01

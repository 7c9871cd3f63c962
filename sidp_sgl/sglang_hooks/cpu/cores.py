"""Which cores each CPU rank gets: more OpenMP threads than cores per rank is ruinous."""

import os

BIND_VARIABLE = "SGLANG_CPU_OMP_THREADS_BIND"
THREADS_VARIABLE = "OMP_NUM_THREADS"
_ours: dict[str, str] = {}  # what this module set, so that the next engine may set it anew


def plan_cores(cores: list[int], num_ranks: int) -> list[list[int]]:
    """Cores of every rank: disjoint and contiguous while they last, else one each in turn.

    >>> plan_cores([0, 1, 2, 3], 2)
    [[0, 1], [2, 3]]
    >>> plan_cores([0, 1], 4)
    [[0], [1], [0], [1]]
    """
    if num_ranks >= len(cores):
        return [[cores[rank % len(cores)]] for rank in range(num_ranks)]
    per_rank = len(cores) // num_ranks
    return [cores[rank * per_rank : (rank + 1) * per_rank] for rank in range(num_ranks)]


def divide_cores(num_ranks: int) -> None:
    """Set the binding and thread count that ranks inherit, unless the user has set them."""
    plan = plan_cores(sorted(os.sched_getaffinity(0)), num_ranks)
    bind = "|".join(",".join(map(str, cores)) for cores in plan)
    for variable, value in ((BIND_VARIABLE, bind), (THREADS_VARIABLE, str(len(plan[0])))):
        if os.environ.get(variable) in (None, _ours.get(variable)):
            os.environ[variable] = _ours[variable] = value

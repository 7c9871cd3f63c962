"""Which cores each CPU rank gets: more OpenMP threads than cores per rank is ruinous.

Room: sglang_hooks. The plan is the scheduler room's; here it becomes the environment variables that
SGLang's ranks read.
"""

import os

from sidp_sgl.scheduler.cores import plan_cores

BIND_VARIABLE = "SGLANG_CPU_OMP_THREADS_BIND"
THREADS_VARIABLE = "OMP_NUM_THREADS"
_ours: dict[str, str] = {}  # what this module set, so that the next engine may set it anew


def divide_cores(num_ranks: int) -> None:
    """Set the binding and thread count that ranks inherit, unless the user has set them."""
    plan = plan_cores(sorted(os.sched_getaffinity(0)), num_ranks)
    bind = "|".join(",".join(map(str, cores)) for cores in plan)
    for variable, value in ((BIND_VARIABLE, bind), (THREADS_VARIABLE, str(len(plan[0])))):
        if os.environ.get(variable) in (None, _ours.get(variable)):
            os.environ[variable] = _ours[variable] = value

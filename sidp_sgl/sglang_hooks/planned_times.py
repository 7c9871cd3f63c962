"""With --sidp-calibration: step times from the planner's model of the machine, not measured.

Room: sglang_hooks. What the engine learns while it runs corrects them, as it does measured ones.
"""

from dataclasses import replace
from typing import Any

from sidp_sgl.config import SidpConfig, SidpUsageError
from sidp_sgl.planner.group_times import GroupTimes, Pooling
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import shape_from_config
from sidp_sgl.planner.time_model import RankTimes
from sidp_sgl.planner.weights import Split
from sidp_sgl.scheduler.step_times import StepTimes
from sidp_sgl.sglang_hooks.calibration import CONTEXT_TOKENS
from sidp_sgl.weightpool.staging import ROWS_PER_RANK

FLAG = "--sidp-calibration"


def planned_times(config: SidpConfig, hf_config: Any, num_ranks: int) -> StepTimes | None:
    """What a rank begins with; None without --sidp-calibration.

    Raises SidpUsageError for a file that can't be read or a model that the planner does not know.
    """
    if config.sidp_calibration is None:
        return None
    machine = Machine.from_json(config.sidp_calibration, FLAG)
    if config.sidp_link_gbps is not None:
        pace = min(config.sidp_link_gbps * 1e9, machine.link_bandwidth)
        # The pace is that of fetches: rows go at the link's own rate.
        rows = machine.row_bandwidth or machine.link_bandwidth
        machine = replace(machine, link_bandwidth=pace, row_bandwidth=rows)
    try:
        shape = shape_from_config(hf_config.to_dict(), "the model")
    except SidpUsageError as error:
        raise SidpUsageError(f"{FLAG} does not go with this model ({error}): drop it") from error
    pooling = Pooling(
        num_ranks,
        config.sidp_pool,
        config.sidp_placement,
        config.sidp_prefetch_order,
        config.sidp_cache_slots,
    )
    group = GroupTimes(RankTimes(shape, machine, Split()), pooling)
    return group.step_times(CONTEXT_TOKENS, ROWS_PER_RANK)

"""One level below the simulated steps: the same deployment layer by layer, by the event model.

Room: planner; pure. Jobs run step by step, with what an order costs taken from
`planner/prefetch_factor.py`; here it is modelled for one make-up of a step, with every fetch, slot
and owner's link, for as many steps as are asked for. All ranks do the same step.
"""

from sidp_sgl.planner.deployment import Deployment
from sidp_sgl.planner.event_model import Setting, StepTime, relative_step_time
from sidp_sgl.planner.time_model import Work


def prefetch_setting(deployment: Deployment, work: Work, jitter: float = 0.0) -> Setting:
    """A step that computes `work`, in units of a layer's compute. Without jitter all ranks are in
    step for ever; with it they begin anywhere within a step. Raises ValueError without SiDP."""
    if not deployment.fetch_seconds():
        raise ValueError(f"{deployment.label} fetches nothing")
    group, shape = deployment.group, deployment.node.shape
    pooling = group.pooling
    layer_seconds = deployment.rank.compute_seconds(work) / shape.num_layers
    return Setting(
        num_ranks=deployment.dp,
        num_layers=shape.num_layers,
        order=pooling.order,
        turns=pooling.turns,
        num_slots=max(map(group.placement.slots, range(pooling.num_ranks))),
        fetch=group.block_seconds(0) / layer_seconds,
        jitter=jitter,
        start_spread=shape.num_layers if jitter else 0.0,
        placement=pooling.placement,
    )


def layered_step(
    deployment: Deployment, work: Work, jitter: float = 0.0, seed: int = 0, num_steps: int = 8
) -> StepTime:
    """Seconds of a WaS step: the median over all ranks, and that of the slowest."""
    setting = prefetch_setting(deployment, work, jitter)
    times = relative_step_time(setting, num_steps, warm_up=num_steps, seed=seed)
    compute = deployment.rank.compute_seconds(work)
    return StepTime(times.all_ranks * compute, times.slowest_rank * compute)

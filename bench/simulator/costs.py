"""Durations of steps of any make-up, exactly as the planner's time model has them, but quickly; and
one step layer by layer, by the event model.

A step's time is a function of its rows plus one that grows in proportion to the KV tokens it reads:
the first is remembered, the second is a product.
"""

from functools import cache
from statistics import fmean

from sidp_sgl.planner.deployment import REPLICAS, SIDP, Deployment
from sidp_sgl.planner.event_model import Setting, StepTime, relative_step_time
from sidp_sgl.planner.time_model import Work
from sidp_sgl.planner.weights import pools_attention
from sidp_sgl.scheduler.modes.times import StepTimes

CALIBRATION_CONTEXT = 128  # tokens, as the engine has it when it calibrates
_MANY = 1e6  # tokens; any number will do


class StepCosts:
    """Of one deployment; all times in seconds. Raises ValueError for what is not modelled,
    as DP attention and sharded_gpu, whose ranks run in lock-step."""

    def __init__(self, deployment: Deployment) -> None:
        if deployment.kind not in (REPLICAS, SIDP):
            raise ValueError(f"the simulator does not know {deployment.label}")
        self.deployment = deployment
        self.streams = deployment.kind == SIDP and deployment.dp > 1
        self.fetch_seconds = deployment.fetch_seconds() if self.streams else 0.0
        self._times = times = deployment.rank
        self._num_layers = deployment.node.shape.num_layers
        self._idle_attention = times.attention_seconds(Work(0, 0, 0, 0))
        many = times.attention_seconds(Work(0, _MANY, _MANY, 0)) - self._idle_attention
        self._per_kv_token = self._num_layers * many / _MANY
        self._rows_seconds = cache(
            lambda rows, sampled: times.compute_seconds(Work(rows, 0, 0, sampled))
        )
        self._sent_seconds = cache(
            lambda batch, all_rows: deployment.group.cas_seconds(
                Work(batch, 0, 0, batch), all_rows / batch
            )
        )
        self.service = cache(self._service)

    def decode(self, batch: int, kv_tokens: int) -> float:
        """Compute of a decode step that reads `kv_tokens` in all, with all weights at hand."""
        return self._rows_seconds(batch, batch) + kv_tokens * self._per_kv_token

    def prefill(self, work: Work) -> float:
        """Compute of any forward pass."""
        attention = self._times.attention_seconds(work) - self._idle_attention
        return self._rows_seconds(work.rows, work.sampled) + self._num_layers * attention

    def streamed(self, compute: float) -> float:
        """The same step where weights are streamed meanwhile (WaS)."""
        return self.deployment.group.streamed_seconds(compute)

    def sent(self, batch: int, kv_tokens: int, all_rows: int) -> float:
        """A decode step in CaS, where `all_rows` rows of all ranks meet at the owners."""
        return self._sent_seconds(batch, all_rows) + kv_tokens * self._per_kv_token

    def _service(self, all_rows: int) -> float:
        """What an owner computes in a CaS step in which `all_rows` rows meet."""
        node, times = self.deployment.node, self._times
        seconds = sum(
            count * times.ffn_seconds(layer, all_rows)
            for layer, count in node.shape.layer_kinds().items()
        )
        if pools_attention(node.shape, node.pool):
            seconds += self._num_layers * times.projection_seconds(0, all_rows)
        return seconds / self.deployment.dp

    @property
    def rows_per_rank(self) -> int:
        """Of a step in CaS, at most."""
        return self.deployment.group.staging.rows_per_rank

    def calibrated(self) -> StepTimes:
        """What the engine measures when it starts."""
        sizes = [2**n for n in range(self.rows_per_rank.bit_length())]
        measured = {size: self.decode(size, size * CALIBRATION_CONTEXT) for size in sizes}
        return StepTimes(self.fetch_seconds, measured)


def prefetch_setting(deployment: Deployment, work: Work, jitter: float = 0.0) -> Setting:
    """For the event model, in units of a layer's compute: every fetch, slot and owner's link of a
    step that all ranks do alike. Without jitter they are in step for ever; with it they begin
    anywhere within a step. Raises ValueError without SiDP."""
    if not deployment.fetch_seconds():
        raise ValueError(f"{deployment.label} fetches nothing")
    group, shape = deployment.group, deployment.node.shape
    pooling = group.pooling
    layer_seconds = deployment.rank.compute_seconds(work) / shape.num_layers
    return Setting(
        num_ranks=deployment.dp,
        num_layers=shape.num_layers,
        num_slots=max(map(group.placement.slots, range(pooling.num_ranks))),
        order=pooling.order,
        turns=pooling.turns,
        fetch=fmean(map(group.block_seconds, range(shape.num_layers))) / layer_seconds,
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

"""Durations of steps of any make-up, exactly as the planner's time model has them, but quickly.

Room: planner; pure. A step's time is a function of its rows plus one that grows in proportion to
the KV tokens it reads: the first is remembered, the second is a product.
"""

from sidp_sgl.planner.deployment import DP_ATTENTION, SHARDED_GPU, SIDP, Deployment
from sidp_sgl.planner.time_model import Work
from sidp_sgl.scheduler.modes.times import StepTimes
from sidp_sgl.weightpool.cas.staging import ROWS_PER_RANK

CALIBRATION_CONTEXT = 128  # tokens, as in sglang_hooks/calibration.py
_MANY = 1e6  # tokens; any number will do


class StepCosts:
    """Of one deployment; all times in seconds. Raises ValueError for DP attention and sharded_gpu,
    whose ranks run in lock-step, which is not modelled."""

    def __init__(self, deployment: Deployment) -> None:
        if deployment.kind in (DP_ATTENTION, SHARDED_GPU):
            raise ValueError(f"the simulator does not know {deployment.label}")
        self.deployment = deployment
        self.streams = deployment.kind == SIDP and deployment.dp > 1
        self.fetch_seconds = deployment.fetch_seconds() if self.streams else 0.0
        self._times = deployment.rank
        self._num_layers = deployment.node.shape.num_layers
        self._idle_attention = self._times.attention_seconds(Work(0, 0, 0, 0))
        many = self._times.attention_seconds(Work(0, _MANY, _MANY, 0)) - self._idle_attention
        self._per_kv_token = self._num_layers * many / _MANY
        self._of_rows: dict[tuple[float, float], float] = {}
        self._of_sent_rows: dict[tuple[int, int], float] = {}
        self._service: dict[int, float] = {}

    def decode(self, batch: int, kv_tokens: int) -> float:
        """Compute of a decode step that reads `kv_tokens` in all, with all weights at hand."""
        return self._rows_seconds(batch, batch) + kv_tokens * self._per_kv_token

    def prefill(self, work: Work) -> float:
        """Compute of any forward pass."""
        attention = self._times.attention_seconds(work) - self._idle_attention
        return self._rows_seconds(work.rows, work.sampled) + self._num_layers * attention

    def _rows_seconds(self, rows: float, sampled: float) -> float:
        seconds = self._of_rows.get((rows, sampled))
        if seconds is None:
            seconds = self._times.compute_seconds(Work(rows, 0, 0, sampled))
            self._of_rows[rows, sampled] = seconds
        return seconds

    def streamed(self, compute: float) -> float:
        """The same step where weights are streamed meanwhile (WaS)."""
        return self.deployment.group.streamed_seconds(compute)

    def sent(self, batch: int, kv_tokens: int, all_rows: int) -> float:
        """A decode step in CaS, where `all_rows` rows of all ranks meet at the owners."""
        key = batch, all_rows
        seconds = self._of_sent_rows.get(key)
        if seconds is None:
            work = Work(batch, 0, 0, batch)
            seconds = self.deployment.group.cas_seconds(work, all_rows / batch)
            self._of_sent_rows[key] = seconds
        return seconds + kv_tokens * self._per_kv_token

    def service(self, all_rows: int) -> float:
        """What an owner computes in a CaS step in which `all_rows` rows meet."""
        seconds = self._service.get(all_rows)
        if seconds is None:
            node, times = self.deployment.node, self._times
            seconds = sum(
                count * times.ffn_seconds(layer, all_rows)
                for layer, count in node.shape.layer_kinds().items()
            )
            if node.pool == "linear":
                seconds += self._num_layers * times.projection_seconds(0, all_rows)
            seconds /= self.deployment.dp
            self._service[all_rows] = seconds
        return seconds

    def calibrated(self) -> StepTimes:
        """What the engine measures when it starts."""
        sizes = [2**n for n in range(ROWS_PER_RANK.bit_length())]
        measured = {size: self.decode(size, size * CALIBRATION_CONTEXT) for size in sizes}
        return StepTimes(self.fetch_seconds, measured)

"""What the planner and the simulator say of a calibrated machine, for bench/validate_model."""

import statistics
from collections.abc import Callable

from bench.simulator import Request, Settings, simulate
from sidp_sgl.planner.deployment import REPLICAS, SIDP, Deployment, Node
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import ModelShape


class Predictions:
    """Of several calibrations of one machine, whose speed moves: the mean of what each says."""

    def __init__(self, shape: ModelShape, machines: list[Machine], num_ranks: int) -> None:
        self._nodes = [Node(shape, machine, num_ranks) for machine in machines]
        self._num_ranks = num_ranks

    def step_seconds(self, side: str, batch: int, context: float) -> float:
        """A decode step of a rank whose requests have `context` tokens."""

        def seconds(node: Node) -> float:
            threshold = self._threshold(node, context)
            return self._deployment(node, side).decode_seconds(batch, context, threshold)

        return self._mean(seconds)

    def threshold(self, context: float) -> float:
        """The batch from which auto streams weights."""
        return self._mean(lambda node: self._threshold(node, context))

    def fetch_seconds(self) -> float:
        """All fetches of a WaS step."""
        return self._mean(lambda node: self._deployment(node, "was").group.fetch_seconds)

    def tokens_per_second(self, side: str, requests: list[Request]) -> float:
        """Of all ranks together over a whole job, by the simulator."""
        settings = Settings(ignore_eos=True)

        def of(node: Node) -> float:
            return simulate(
                self._deployment(node, side), requests, settings=settings
            ).tokens_per_second

        return self._mean(of)

    def drift(self, batches: tuple[int, ...], context: float) -> float:
        """How far the calibrations lie apart: the most, over `batches`, in plain DP's step."""
        furthest = 0.0
        for batch in batches:
            said = [
                self._deployment(node, "plain").decode_seconds(batch, context)
                for node in self._nodes
            ]
            furthest = max(furthest, max(said) / min(said) - 1)
        return furthest

    def _threshold(self, node: Node, context: float) -> int:
        group = self._deployment(node, "auto").group
        return group.threshold(context, group.staging.rows_per_rank)

    def _deployment(self, node: Node, side: str) -> Deployment:
        if side == "plain":
            return Deployment(node, REPLICAS, 1, self._num_ranks)
        return Deployment(node, SIDP, 1, self._num_ranks, side)

    def _mean(self, say: Callable[[Node], float]) -> float:
        return statistics.fmean(say(node) for node in self._nodes)

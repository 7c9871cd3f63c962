"""One way to run the model on the node: what a GPU holds, and how long its steps take.

Every deployment answers the same questions, so that they can be compared.
"""

from dataclasses import dataclass
from functools import cached_property

from sidp_sgl.planner.group_times import GroupTimes, Pooling
from sidp_sgl.planner.machine import EAGER_LAYER_SECONDS, Machine
from sidp_sgl.planner.memory import RankMemory
from sidp_sgl.planner.models import ModelShape
from sidp_sgl.planner.time_model import RankTimes, Work
from sidp_sgl.planner.weights import Split, kv_bytes, layer_weights, part_bytes

REPLICAS, DP_ATTENTION, SHARDED_GPU, SIDP = "replicas", "dp-attention", "sharded_gpu", "sidp"
DWDP = "dwdp"
_GATHERED_LAYERS = 2  # that sharded_gpu holds: the one in use and the next
_CHUNK = 8192  # tokens of a prefill pass: SGLang's default on large GPUs


@dataclass(frozen=True)
class Node:
    """What is planned for: model, GPUs and the settings that all deployments share."""

    shape: ModelShape
    machine: Machine
    num_gpus: int
    mem_fraction: float = 0.9
    kv_dtype: str = "bf16"
    pool: str = "ffn"
    slots: int | None = None
    placement: str = "interleaved"
    order: str = "sequential"
    turns: bool = True


@dataclass(frozen=True)
class Deployment:
    """`tp` GPUs per rank, `dp` ranks; with DP attention `tp` are those of one rank's attention, and
    experts lie over all GPUs, each of them whole (EP).

    `mode` is that of `--sidp-mode`.
    """

    node: Node
    kind: str
    tp: int
    dp: int
    mode: str = ""

    @property
    def label(self) -> str:
        split = f"TP{self.tp}/DP{self.dp}"
        if self.kind == REPLICAS:
            names = [f"TP{self.tp}"] * (self.tp > 1) + [f"DP{self.dp}"] * (self.dp > 1)
            return "/".join(names) or "one GPU"
        if self.kind == DP_ATTENTION:
            experts = f"EP{self.node.num_gpus}, " if self.node.shape.num_experts else ""
            return f"{experts}DP attention {split}"
        if self.kind == SIDP:
            return f"SiDP {self.mode} {split}"
        return f"{'DWDP' if self.kind == DWDP else self.kind} DP{self.dp}"

    @property
    def split(self) -> Split:
        if self.kind != DP_ATTENTION:
            return Split.of(self.tp)
        num = self.node.num_gpus
        return Split(self.tp, num, self.tp, num, num if self.node.shape.num_experts else 1)

    @cached_property
    def rank(self) -> RankTimes:
        return RankTimes(
            self.node.shape,
            self.node.machine,
            self.split,
            self.node.kv_dtype,
            ranks_in_ffn=self.dp if self.kind == DP_ATTENTION else 1,
        )

    @cached_property
    def group(self) -> GroupTimes:
        """Of SiDP's ranks; defined for dp > 1."""
        node = self.node
        pooling = Pooling(self.dp, node.pool, node.placement, node.slots, node.order, node.turns)
        return GroupTimes(self.rank, pooling)

    @cached_property
    def memory(self) -> RankMemory:
        """One GPU, the fullest."""
        node, weights = self.node, part_bytes(self.node.shape, self.split).total
        device = (node.machine.memory_bytes, node.mem_fraction)
        if self.kind == SHARDED_GPU:
            layers = part_bytes(node.shape, self.split)
            pooled = layers.attention + layers.ffn + layers.experts
            gathered = _GATHERED_LAYERS * pooled // node.shape.num_layers
            return RankMemory(*device, weights - pooled, pooled, -(-pooled // self.dp), gathered)
        if self.kind == DWDP:
            experts = self._expert_bytes
            pooled, remote = sum(experts), max(experts) * (self.dp - 1) // self.dp
            slots = _GATHERED_LAYERS * remote
            return RankMemory(*device, weights - pooled, pooled, -(-pooled // self.dp), slots)
        if self.kind != SIDP:
            return RankMemory(*device, replicated_bytes=weights)
        placement, ranks = self.group.placement, range(self.dp)
        return RankMemory(
            *device,
            replicated_bytes=max(0, weights - placement.pooled_bytes),
            pooled_bytes=placement.pooled_bytes,
            owned_bytes=max(map(placement.owned_bytes, ranks)),
            cache_bytes=max(map(placement.cache_bytes, ranks)),
            staging_bytes=0 if self.mode == "was" else self.group.staging.num_bytes,
        )

    @cached_property
    def _expert_bytes(self) -> list[int]:
        """Of every layer with experts: what DWDP pools of them, all but their scales."""
        shape = self.node.shape
        return [
            sum(gemm.tensors[0] for gemm in layer_weights(shape, layer, self.split).experts)
            for layer, count in shape.layer_kinds().items()
            for _ in range(count if shape.is_moe(layer) else 0)
        ]

    def kv_tokens(self) -> int:
        """KV capacity of one rank."""
        per_token = kv_bytes(self.node.shape, self.split.attention, self.node.kv_dtype)
        return self.memory.kv_tokens(per_token)

    def max_running_requests(self) -> int:
        """Of one rank, as SGLang limits it by default."""
        estimated = int(self.kv_tokens() / self.node.shape.max_position * 512)
        return max(min(estimated, 4096), 2048)

    def batch(self, sequence: int) -> int:
        """Requests of `sequence` tokens that run at once on one rank, none of them preempted."""
        return min(self.kv_tokens() // sequence, self.max_running_requests())

    def fetch_seconds(self) -> float:
        """What the other ranks' weights take in a step; 0 where there is nothing to fetch."""
        if self.kind == SIDP:
            return self.group.fetch_seconds
        machine, share = self.node.machine, (self.dp - 1) / self.dp
        if self.kind == SHARDED_GPU:
            copies = self.dp * self.node.shape.num_layers * machine.copy_seconds
            return copies + share * self.memory.pooled_bytes / machine.link_bandwidth
        if self.kind == DWDP:  # from every other rank, of both weights
            copies = 2 * (self.dp - 1) * len(self._expert_bytes) * machine.copy_seconds
            return copies + share * self.memory.pooled_bytes / machine.link_bandwidth
        return 0.0

    def decode_seconds(self, batch: int, context: float, threshold: int = 0) -> float:
        """A decode step of a rank; `threshold` as in `GroupTimes.threshold`, for SiDP."""
        if self.kind == SIDP:
            return self.group.decode_seconds(self.mode, batch, context, threshold)
        compute = self.rank.compute_seconds(Work.decode(batch, context))
        if self.kind == DWDP:  # without CUDA graphs: the host may be slower than the GPU
            compute = max(compute, self.node.shape.num_layers * EAGER_LAYER_SECONDS)
        return self._with_fetches(compute)

    def _with_fetches(self, compute: float) -> float:
        """A pass of `compute` seconds and its fetches."""
        fetches = self.fetch_seconds()
        if self.kind == DWDP:  # begins anew in every pass: the first fetch is hidden by nothing
            first = fetches / len(self._expert_bytes)
            return max(first + compute, fetches + compute / self.node.shape.num_layers)
        # Within a CUDA graph sharded_gpu gathers and computes in turn.
        return compute + fetches

    def runs(self, batch: int, threshold: int) -> str:
        """The mode of such a step; "" without SiDP."""
        return self.group.runs(self.mode, batch, threshold) if self.kind == SIDP else ""

    def prefill_seconds(self, prompt: int) -> float:
        """Of one prompt, in full passes over its own or several prompts' tokens."""
        work = Work.prefill(_CHUNK, prompt)
        if self.kind == SIDP:
            seconds = self.group.was_seconds(work)
        else:
            seconds = self._with_fetches(self.rank.compute_seconds(work))
        return seconds * prompt / _CHUNK

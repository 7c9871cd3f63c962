"""Time of one rank's step with all weights at hand: GEMMs, attention, collectives, overheads.

A GEMM takes as long as its bytes or its arithmetic, whichever is longer. All times in seconds; a
rank is a tensor-parallel group of GPUs whose GPUs do the same.
"""

from dataclasses import dataclass
from functools import cached_property

from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import ModelShape
from sidp_sgl.planner.weights import (
    Gemm,
    LayerWeights,
    Split,
    kv_bytes,
    layer_weights,
    padded_vocab,
)

_ACTIVATION = 2  # bytes of an element of a row


def gemm_seconds(machine: Machine, gemm: Gemm, rows: float, share: float = 1.0) -> float:
    """`rows` times one weight; of several copies (experts) a `share` is read."""
    num_bytes = share * gemm.num_bytes + rows * (gemm.in_width + gemm.out_width) * _ACTIVATION
    flops = 2 * rows * gemm.in_width * gemm.out_width
    return machine.kernel_seconds + max(
        num_bytes / machine.hbm_bandwidth, flops / machine.flops(gemm.dtype)
    )


def experts_share(num_experts: int, experts_per_token: int, rows: float) -> float:
    """Expected share of the experts that `rows` choose, each evenly and for itself."""
    return 1 - (1 - experts_per_token / num_experts) ** rows


@dataclass(frozen=True)
class Work:
    """What a forward pass of one rank computes.

    `rows`: its tokens. `kv_tokens`: tokens whose keys and values are read. `scores`: pairs of a
    query and a key. `sampled`: rows of the LM head.
    """

    rows: float
    kv_tokens: float
    scores: float
    sampled: float

    @classmethod
    def decode(cls, batch: float, context: float) -> "Work":
        """One token for each of `batch` requests of `context` tokens."""
        return cls(batch, batch * context, batch * context, batch)

    @classmethod
    def prefill(cls, chunk: float, prompt: float) -> "Work":
        """A chunk of prompts; each query sees half of its prompt on average."""
        # A long prompt comes in several chunks, each of which reads those before it.
        kv_tokens = chunk + max(0.0, prompt - chunk) / 2
        return cls(chunk, kv_tokens, chunk * prompt / 2, max(1.0, chunk / prompt))


@dataclass(frozen=True)
class RankTimes:
    """The parts of a step on one rank. With DP attention the rows of all `ranks_in_ffn` ranks meet
    in the FFN and the LM head, which all GPUs share."""

    shape: ModelShape
    machine: Machine
    split: Split
    kv_dtype: str = "bf16"
    ranks_in_ffn: int = 1

    @cached_property
    def _weights(self) -> dict[bool, LayerWeights]:
        return {
            self.shape.is_moe(layer): layer_weights(self.shape, layer, self.split)
            for layer in self.shape.layer_kinds()
        }

    def weights(self, layer: int) -> LayerWeights:
        return self._weights[self.shape.is_moe(layer)]

    def projection_seconds(self, layer: int, rows: float) -> float:
        """The attention's linear layers."""
        return self._gemms_seconds(self.weights(layer).attention, rows)

    def _gemms_seconds(self, gemms: tuple[Gemm, ...], rows: float, share: float = 1.0) -> float:
        return sum(gemm_seconds(self.machine, gemm, rows, share) for gemm in gemms)

    def attention_seconds(self, work: Work) -> float:
        """Attention proper, of one layer."""
        shape, machine = self.shape, self.machine
        token_bytes = kv_bytes(shape, self.split.attention, self.kv_dtype) / shape.num_layers
        return machine.kernel_seconds + max(
            work.kv_tokens * token_bytes / machine.kv_bandwidth,
            self._attention_flops(work) / machine.bf16_flops,
        )

    def _attention_flops(self, work: Work) -> float:
        shape, latent = self.shape, self.shape.latent
        heads = shape.num_heads // self.split.attention
        if latent is None:
            return 4 * work.scores * heads * shape.head_dim
        # Either every head works on the latent vectors, or keys and values are made of them.
        on_latents = work.scores * (2 * latent.kv_rank + latent.rope_dim)
        earlier = max(0.0, work.kv_tokens - work.rows)  # the others are made by the projections
        made = earlier * latent.kv_rank * (latent.nope_dim + latent.value_dim)
        expanded = work.scores * (shape.head_dim + latent.value_dim) + made
        return 2 * heads * min(on_latents, expanded)

    def request_seconds(self, work: Work) -> float:
        """Of one layer, for requests as such: CPUs attend to one after another."""
        return self.machine.attention_request_seconds * work.sampled

    def router_seconds(self, layer: int, rows: float) -> float:
        """Of one layer; 0 where it has no experts."""
        return self._gemms_seconds(self.weights(layer).router, rows)

    def ffn_seconds(self, layer: int, rows: float) -> float:
        """FFN, or experts and shared ones, of one layer, for `rows` rows in all."""
        weights, shape = self.weights(layer), self.shape
        seconds = self._gemms_seconds(weights.ffn, rows)
        if weights.experts:
            share = experts_share(shape.num_experts, shape.experts_per_token, rows)
            routed = rows * shape.experts_per_token / self.split.experts
            seconds += self._gemms_seconds(weights.experts, routed, share)
        return seconds

    def collective_seconds(self, rows: float, num_gpus: int) -> float:
        """One all-reduce of `rows` rows, or a gather and a scatter of as many."""
        if num_gpus == 1:
            return 0.0
        num_bytes = rows * self.shape.hidden_size * _ACTIVATION
        moved = 2 * (num_gpus - 1) / num_gpus * num_bytes
        bandwidth = self.machine.row_bandwidth or self.machine.link_bandwidth
        return self.machine.collective_seconds + moved / bandwidth

    def other_seconds(self, rows: float) -> float:
        """Norms, rotary embedding, activation and the attention's all-reduce, of one layer."""
        passes = 8  # a layer reads and writes its rows about this often outside of GEMMs
        moved = passes * rows * self.shape.hidden_size * _ACTIVATION
        return (
            self.machine.layer_seconds
            + moved / self.machine.hbm_bandwidth
            + self.collective_seconds(rows, self.split.attention)
        )

    def ffn_collective_seconds(self, rows: float) -> float:
        """The all-reduce after one layer's FFN of `rows` rows in all; with DP attention the rows
        are gathered before it and scattered after it."""
        twice = self.machine.collective_seconds if self.ranks_in_ffn > 1 else 0.0
        return twice + self.collective_seconds(rows, self.split.ffn)

    def layer_seconds(self, layer: int, work: Work) -> float:
        """One layer, all of it."""
        ffn_rows = work.rows * self.ranks_in_ffn
        return (
            self.projection_seconds(layer, work.rows)
            + self.attention_seconds(work)
            + self.request_seconds(work)
            + self.other_seconds(work.rows)
            + self.router_seconds(layer, ffn_rows)
            + self.ffn_seconds(layer, ffn_rows)
            + self.ffn_collective_seconds(ffn_rows)
        )

    def head_seconds(self, work: Work) -> float:
        """LM head, sampling and scheduler: once a step."""
        rows = work.sampled * self.ranks_in_ffn
        vocab = padded_vocab(self.shape.vocab_size, self.split.lm_head) // self.split.lm_head
        head = gemm_seconds(self.machine, Gemm(self.shape.hidden_size, vocab), rows)
        gather = rows * vocab * (self.split.lm_head - 1) * _ACTIVATION / self.machine.link_bandwidth
        requests = self.machine.request_seconds * work.sampled
        return self.machine.step_seconds + requests + head + gather

    def compute_seconds(self, work: Work) -> float:
        """The whole step, with all weights at hand."""
        layers = sum(
            count * self.layer_seconds(layer, work)
            for layer, count in self.shape.layer_kinds().items()
        )
        return layers + self.head_seconds(work)

"""Exact weights of one GPU: its share of every linear layer, of the pool, and of all the rest.

Shards as SGLang makes them: vocabulary padded, KV heads replicated where there are more GPUs than
heads.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.planner.memory import kv_bytes_per_token
from sidp_sgl.planner.models import ModelShape
from sidp_sgl.weightpool.alignment import align

POOLS = ("none", "ffn", "linear")
_VOCAB_PADDING = 64  # rows; SGLang's DEFAULT_VOCAB_PADDING_SIZE
_BYTES = {"bf16": 2, "fp8": 1}
_ROTARY_BYTES = 4  # on GPUs SGLang keeps the table in FP32, on CPUs in the model's 16 bits


class Gemm(NamedTuple):
    """One GPU's share of a linear layer (or of `copies` of them, as experts are)."""

    in_width: int
    out_width: int
    has_bias: bool = False
    copies: int = 1

    @property
    def parameters(self) -> int:
        return self.copies * self.out_width * (self.in_width + self.has_bias)

    def num_bytes(self, dtype: str) -> int:
        """Biases stay in 16 bits."""
        weight = self.copies * self.in_width * self.out_width * _BYTES[dtype]
        return weight + self.copies * self.out_width * self.has_bias * 2

    def block_bytes(self, dtype: str) -> int:
        """The same in a block, where every tensor is aligned."""
        weight = self.copies * self.in_width * self.out_width * _BYTES[dtype]
        return align(weight) + align(self.copies * self.out_width * self.has_bias * 2)


@dataclass(frozen=True)
class Split:
    """Over how many GPUs each part is sharded. With DP attention they differ."""

    attention: int = 1
    ffn: int = 1
    embedding: int = 1
    lm_head: int = 1

    @classmethod
    def of(cls, tp: int) -> "Split":
        return cls(tp, tp, tp, tp)


@dataclass(frozen=True)
class LayerWeights:
    """`gate_up` and `down` of the FFN, or of all experts; `norms` in elements."""

    qkv: Gemm
    o: Gemm
    gate_up: Gemm
    down: Gemm
    router: Gemm | None
    norms: int

    def pooled(self, pool: str) -> tuple[Gemm, ...]:
        """What `--sidp-pool` pools. The router stays: it says which experts are asked."""
        ffn = (self.gate_up, self.down)
        return {"none": (), "ffn": ffn, "linear": (self.qkv, self.o, *ffn)}[pool]


@dataclass(frozen=True)
class PartBytes:
    """Weights of one GPU in bytes, by part, and the table of rotary embeddings beside them."""

    embedding: int
    lm_head: int
    attention: int
    ffn: int
    experts: int
    router: int
    norms: int
    rotary: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def check_split(shape: ModelShape, split: Split) -> None:
    """Raises SidpUsageError where SGLang could not shard the model so."""
    kv_fits = shape.num_kv_heads % split.attention == 0 or split.attention % shape.num_kv_heads == 0
    for tp, what, fits in (
        (split.attention, f"{shape.num_heads} heads", shape.num_heads % split.attention == 0),
        (split.attention, f"{shape.num_kv_heads} KV heads", kv_fits),
        (split.ffn, f"{shape.intermediate_size} FFN columns", _ffn_divides(shape, split.ffn)),
    ):
        if not fits:
            raise SidpUsageError(
                f"--tp {tp} does not divide the {what} of {shape.name}: choose another"
            )


def _ffn_divides(shape: ModelShape, tp: int) -> bool:
    sizes = [shape.expert_size if shape.is_moe(k) else shape.intermediate_size
             for k in shape.layer_kinds()]  # fmt: skip
    return all(size % tp == 0 for size in sizes)


def kv_heads(shape: ModelShape, tp: int) -> int:
    """KV heads on one GPU."""
    return max(1, shape.num_kv_heads // tp)


def layer_weights(shape: ModelShape, layer: int, split: Split) -> LayerWeights:
    """One GPU's share of `layer`."""
    hidden, heads = shape.hidden_size, shape.num_heads // split.attention
    q_width, kv_width = heads * shape.head_dim, kv_heads(shape, split.attention) * shape.head_dim
    moe = shape.is_moe(layer)
    size = (shape.expert_size if moe else shape.intermediate_size) // split.ffn
    experts = shape.num_experts if moe else 1
    return LayerWeights(
        qkv=Gemm(hidden, q_width + 2 * kv_width, shape.qkv_bias),
        o=Gemm(q_width, hidden, shape.o_bias),
        gate_up=Gemm(hidden, 2 * size, shape.ffn_bias and not moe, experts),
        down=Gemm(size, hidden, shape.ffn_bias and not moe, experts),
        router=Gemm(hidden, shape.num_experts) if moe else None,
        norms=2 * hidden + (2 * shape.head_dim if shape.qk_norm else 0),
    )


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Rows of the embedding over all GPUs: a multiple of 64, and of 64·tp if it must be."""
    padding = _VOCAB_PADDING
    if -(-vocab_size // padding) * padding % tp:
        padding *= tp
    return -(-vocab_size // padding) * padding


def part_bytes(shape: ModelShape, split: Split) -> PartBytes:
    """All weights of one GPU. Embedding, LM head, router and norms are kept in 16 bits; scales of
    FP8 weights (less than 0.1 %) are not counted."""
    rows = {tp: padded_vocab(shape.vocab_size, tp) // tp for tp in (split.embedding, split.lm_head)}
    attention = ffn = experts = router = 0
    norms = shape.hidden_size
    for layer, count in shape.layer_kinds().items():
        weights = layer_weights(shape, layer, split)
        attention += count * sum(g.num_bytes(shape.dtype) for g in (weights.qkv, weights.o))
        block = count * sum(g.num_bytes(shape.dtype) for g in (weights.gate_up, weights.down))
        experts, ffn = (experts + block, ffn) if weights.router else (experts, ffn + block)
        router += count * weights.router.num_bytes("bf16") if weights.router else 0
        norms += count * weights.norms
    return PartBytes(
        embedding=2 * shape.hidden_size * rows[split.embedding],
        lm_head=0 if shape.tied else 2 * shape.hidden_size * rows[split.lm_head],
        attention=attention,
        ffn=ffn,
        experts=experts,
        router=router,
        norms=2 * norms,
        rotary=_ROTARY_BYTES * shape.max_position * shape.head_dim,
    )


def block_bytes(shape: ModelShape, layer: int, split: Split, pool: str) -> int:
    """Size of `layer`'s block on one GPU."""
    pooled = layer_weights(shape, layer, split).pooled(pool)
    return sum(gemm.block_bytes(shape.dtype) for gemm in pooled)


def kv_bytes(shape: ModelShape, tp: int, kv_dtype: str) -> int:
    """KV bytes of one token on one GPU."""
    heads = kv_heads(shape, tp)
    return kv_bytes_per_token(shape.num_layers, heads, shape.head_dim, _BYTES[kv_dtype])


def num_parameters(shape: ModelShape) -> int:
    """Parameters of the model as published: unpadded, unsharded."""
    total = shape.hidden_size * (1 + shape.vocab_size * (1 if shape.tied else 2))
    for layer, count in shape.layer_kinds().items():
        weights = layer_weights(shape, layer, Split())
        gemms = [weights.qkv, weights.o, weights.gate_up, weights.down]
        gemms += [weights.router] if weights.router else []
        total += count * (weights.norms + sum(gemm.parameters for gemm in gemms))
    return total

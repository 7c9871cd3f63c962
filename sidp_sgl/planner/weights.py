"""Exact weights of one GPU: its share of every linear layer, of the pool, and of all the rest.

Shards as SGLang makes them: vocabulary padded, KV heads replicated where there are more GPUs than
heads, what latent attention projects down to replicated always.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.planner.memory import kv_bytes_per_token
from sidp_sgl.planner.models import ModelShape
from sidp_sgl.weightpool.alignment import align

_VOCAB_PADDING = 64  # rows; SGLang's DEFAULT_VOCAB_PADDING_SIZE
_BYTES = {"bf16": 2, "fp8": 1}
_ROUTER_BIAS_BYTES = 4
_PIECE_ROWS = 64  # a block of a table has a multiple of so many
_ROTARY_BYTES = 4  # on GPUs SGLang keeps the table in FP32, on CPUs in the model's 16 bits


class Gemm(NamedTuple):
    """One GPU's share of a linear layer (or of `copies` of them, as experts are). `scale_block`:
    rows and columns of the weight that share a scale; None where there are no such scales."""

    in_width: int
    out_width: int
    has_bias: bool = False
    copies: int = 1
    dtype: str = "bf16"
    scale_block: tuple[int, int] | None = None

    @property
    def parameters(self) -> int:
        return self.copies * self.out_width * (self.in_width + self.has_bias)

    @property
    def tensors(self) -> tuple[int, int, int]:
        """Bytes of weight, bias (of 16 bits) and scales (of FP32)."""
        scales = 0
        if self.scale_block:
            rows, columns = self.scale_block
            scales = -(-self.out_width // rows) * -(-self.in_width // columns)
        weight = self.in_width * self.out_width * _BYTES[self.dtype]
        return (
            self.copies * weight,
            self.copies * self.out_width * self.has_bias * 2,
            self.copies * scales * 4,
        )

    @property
    def num_bytes(self) -> int:
        return sum(self.tensors)

    @property
    def block_bytes(self) -> int:
        """The same in a block, where every tensor is aligned."""
        return sum(map(align, self.tensors))


@dataclass(frozen=True)
class Split:
    """Over how many GPUs each part is sharded. With DP attention they differ. `experts` are dealt
    out whole (EP) over so many; 1: they are sharded as an FFN is."""

    attention: int = 1
    ffn: int = 1
    embedding: int = 1
    lm_head: int = 1
    experts: int = 1

    @classmethod
    def of(cls, tp: int) -> "Split":
        return cls(tp, tp, tp, tp)


class Unit(NamedTuple):
    """What is sent to an owner at once. `payload`: bytes of a row of each of its tensors;
    `result`: of a row on its way back."""

    gemms: tuple[Gemm, ...]
    payload: tuple[int, ...]
    result: int

    @classmethod
    def of(cls, gemms: tuple[Gemm, ...], *routed: int) -> "Unit":
        """Rows of 16 bits; `routed`: bytes of what travels with them."""
        return cls(gemms, (2 * gemms[0].in_width, *routed), 2 * gemms[-1].out_width)

    @property
    def row_bytes(self) -> tuple[int, int]:
        """As staging counts a row, with every tensor of the payload aligned; and its result."""
        return sum(map(align, self.payload)), self.result


@dataclass(frozen=True)
class LayerWeights:
    """Linear layers of one decoder layer, in the order of the forward pass. `attention`: qkv and o,
    or latent attention's. `ffn`: gate_up and down of the FFN, or of the shared experts; empty where
    there is neither. `experts`: the same of all experts. `norms` in elements."""

    attention: tuple[Gemm, ...]
    ffn: tuple[Gemm, ...]
    experts: tuple[Gemm, ...]
    router: tuple[Gemm, ...]  # and the gate of the shared experts
    norms: int

    @property
    def gemms(self) -> tuple[Gemm, ...]:
        return self.attention + self.ffn + self.experts + self.router


@dataclass(frozen=True)
class PartBytes:
    """Weights of one GPU in bytes, by part, scales with them; and what SGLang makes beside them.
    Shared experts are part of `ffn`."""

    embedding: int
    lm_head: int
    attention: int
    ffn: int
    experts: int
    router: int
    norms: int
    rotary: int
    absorbed: int  # latent attention's kv_b_proj, of which SGLang keeps a copy in 16 bits

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def check_split(shape: ModelShape, split: Split) -> None:
    """Raises SidpUsageError where SGLang could not shard the model so."""
    for tp, width, what in _cuts(shape, split):
        block = max(shape.scale_block or (1,)) if what.endswith("columns") else 1
        if width % (tp * block):
            raise SidpUsageError(
                f"--tp {tp} does not divide the {width} {what} of {shape.name}"
                + (f" in blocks of {block} (weight_block_size)" if width % tp == 0 else "")
                + ": choose another"
            )


def _cuts(shape: ModelShape, split: Split) -> Iterator[tuple[int, int, str]]:
    """Number of GPUs, and what is cut into as many pieces: of columns, whole scale blocks."""
    tp, kinds = split.attention, {shape.is_moe(layer) for layer in shape.layer_kinds()}
    yield tp, shape.num_heads, "heads"
    yield tp, shape.num_heads * _value_dim(shape), "attention columns"
    if tp % shape.num_kv_heads:  # else every GPU has one, which others may have too
        yield tp, shape.num_kv_heads, "KV heads"
    if False in kinds:
        yield split.ffn, shape.intermediate_size, "FFN columns"
    if True in kinds:
        yield split.ffn, shape.shared_size, "shared experts' columns"
        if split.experts == 1:
            yield split.ffn, shape.expert_size, "FFN columns"
        yield split.experts, shape.num_experts, "experts"


def _value_dim(shape: ModelShape) -> int:
    return shape.latent.value_dim if shape.latent else shape.head_dim


def kv_heads(shape: ModelShape, tp: int) -> int:
    """KV heads on one GPU."""
    return max(1, shape.num_kv_heads // tp)


def layer_weights(shape: ModelShape, layer: int, split: Split) -> LayerWeights:
    """One GPU's share of `layer`."""
    hidden, moe = shape.hidden_size, shape.is_moe(layer)
    norms = 2 * hidden + (2 * shape.head_dim if shape.qk_norm else 0)
    if shape.latent:
        norms += shape.latent.q_rank + shape.latent.kv_rank
    router: tuple[Gemm, ...] = ()
    experts: tuple[Gemm, ...] = ()
    if moe:
        router = (Gemm(hidden, shape.num_experts),) + (Gemm(hidden, 1),) * shape.shared_gate
        cut = split.ffn if split.experts == 1 else 1
        experts = _ffn(shape, shape.expert_size // cut, shape.num_experts // split.experts)
    width = shape.shared_size if moe else shape.intermediate_size
    return LayerWeights(
        attention=_attention(shape, split.attention),
        ffn=_ffn(shape, width // split.ffn, bias=shape.ffn_bias) if width else (),
        experts=experts,
        router=router,
        norms=norms,
    )


def _linear(
    shape: ModelShape, in_width: int, out_width: int, bias: bool = False, copies: int = 1
) -> Gemm:
    return Gemm(in_width, out_width, bias, copies, shape.dtype, shape.scale_block)


def _ffn(shape: ModelShape, width: int, copies: int = 1, bias: bool = False) -> tuple[Gemm, ...]:
    hidden = shape.hidden_size
    return (
        _linear(shape, hidden, 2 * width, bias, copies),
        _linear(shape, width, hidden, bias, copies),
    )


def _attention(shape: ModelShape, tp: int) -> tuple[Gemm, ...]:
    hidden, heads = shape.hidden_size, shape.num_heads // tp
    queries, values = heads * shape.head_dim, heads * _value_dim(shape)
    o = _linear(shape, values, hidden, shape.o_bias)
    latent = shape.latent
    if latent is None:
        keys = kv_heads(shape, tp) * shape.head_dim
        return _linear(shape, hidden, queries + 2 * keys, shape.qkv_bias), o
    down = latent.kv_rank + latent.rope_dim
    kv_b = _linear(shape, latent.kv_rank, heads * (latent.nope_dim + latent.value_dim))
    if latent.q_rank:
        a = _linear(shape, hidden, latent.q_rank + down)
        return a, _linear(shape, latent.q_rank, queries), kv_b, o
    return _linear(shape, hidden, queries), _linear(shape, hidden, down), kv_b, o


def pools_attention(shape: ModelShape, pool: str) -> bool:
    """Latent attention is never pooled."""
    return pool != "ffn" and shape.latent is None


def units(shape: ModelShape, layer: int, split: Split, pool: str) -> tuple[Unit, ...]:
    """What `--sidp-pool` pools of `layer` on one GPU. The router stays: it says which experts are
    asked, by an FP32 weight and an INT32 id for each of a row's."""
    weights = layer_weights(shape, layer, split)
    found = []
    if pools_attention(shape, pool):
        found += [Unit.of((gemm,)) for gemm in weights.attention]
    if weights.ffn:
        found.append(Unit.of(weights.ffn))
    if weights.experts:
        found.append(Unit.of(weights.experts, *[4 * shape.experts_per_token] * 2))
    return tuple(found)


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Rows of the embedding over all GPUs: a multiple of 64, and of 64·tp if it must be."""
    padding = _VOCAB_PADDING
    if -(-vocab_size // padding) * padding % tp:
        padding *= tp
    return -(-vocab_size // padding) * padding


def part_bytes(shape: ModelShape, split: Split) -> PartBytes:
    """All weights of one GPU. Embedding, LM head, router and norms are kept in 16 bits."""
    rows = {tp: padded_vocab(shape.vocab_size, tp) // tp for tp in (split.embedding, split.lm_head)}
    parts = dict.fromkeys(("attention", "ffn", "experts", "router"), 0)
    norms, absorbed = shape.hidden_size, 0
    for layer, count in shape.layer_kinds().items():
        weights = layer_weights(shape, layer, split)
        for part in parts:
            parts[part] += count * sum(gemm.num_bytes for gemm in getattr(weights, part))
        norms += count * weights.norms
        if weights.router and shape.router_bias:
            parts["router"] += count * _ROUTER_BIAS_BYTES * shape.num_experts
        if shape.latent:
            absorbed += count * 2 * weights.attention[-2].parameters
    return PartBytes(
        embedding=2 * shape.hidden_size * rows[split.embedding],
        lm_head=0 if shape.tied else 2 * shape.hidden_size * rows[split.lm_head],
        norms=2 * norms,
        rotary=_ROTARY_BYTES * shape.max_position * shape.rotary_dim,
        absorbed=absorbed,
        **parts,
    )


def table_pieces(shape: ModelShape, split: Split, largest: int) -> tuple[list[int], list[int]]:
    """Bytes of the blocks that embedding and LM head are on one GPU with `--sidp-pool all`, none of
    which is larger than `largest`. Tied tables are the head's."""
    row = 2 * shape.hidden_size
    most = max(_PIECE_ROWS, largest // row // _PIECE_ROWS * _PIECE_ROWS)

    def pieces(tp: int) -> list[int]:
        rows = padded_vocab(shape.vocab_size, tp) // tp
        return [row * min(most, rows - first) for first in range(0, rows, most)]

    return [] if shape.tied else pieces(split.embedding), pieces(split.lm_head)


def block_bytes(shape: ModelShape, layer: int, split: Split, pool: str) -> int:
    """Size of `layer`'s block on one GPU."""
    return sum(g.block_bytes for unit in units(shape, layer, split, pool) for g in unit.gemms)


def kv_bytes(shape: ModelShape, tp: int, kv_dtype: str) -> int:
    """KV bytes of one token on one GPU. The heads of latent attention share theirs, and every GPU
    has it whole."""
    if shape.latent:
        width = shape.latent.kv_rank + shape.latent.rope_dim
        return shape.num_layers * width * _BYTES[kv_dtype]
    heads = kv_heads(shape, tp)
    return kv_bytes_per_token(shape.num_layers, heads, shape.head_dim, _BYTES[kv_dtype])


def num_parameters(shape: ModelShape) -> int:
    """Parameters of the model as published: unpadded, unsharded."""
    total = shape.hidden_size * (1 + shape.vocab_size * (1 if shape.tied else 2))
    for layer, count in shape.layer_kinds().items():
        weights = layer_weights(shape, layer, Split())
        total += count * (weights.norms + sum(gemm.parameters for gemm in weights.gemms))
        total += count * shape.num_experts * (shape.router_bias and bool(weights.router))
    return total

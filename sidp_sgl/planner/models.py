"""The shape of a model, from a Hugging Face config.json or by a built-in name.

Neither torch nor transformers: what a plan needs are a dozen numbers.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sidp_sgl.errors import SidpUsageError

BUILT_IN = Path(__file__).parent / "model_configs"
DTYPES = ("bf16", "fp8")
_DENSE = ("llama", "mistral", "qwen2", "qwen3")
_LATENT = ("deepseek_v2", "deepseek_v3")
_MOE = ("qwen2_moe", "qwen3_moe", "mixtral", *_LATENT)


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (MLA): ranks and, per head, widths in elements. A token's KV is
    its latent vector and its rotary key, for all heads together."""

    q_rank: int  # 0: queries are projected at once
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only model; widths in elements. `intermediate_size` is that of dense layers,
    `expert_size` that of one expert, `shared_size` that of all shared experts of a layer together;
    `num_experts` is 0 for a dense model. `head_dim` is that of queries and keys."""

    name: str
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    tied: bool = False  # the LM head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shared_size: int = 0
    shared_gate: bool = False  # the shared experts' result is weighted by a gate of its own
    router_bias: bool = False  # of FP32
    dense_layers: tuple[int, ...] = ()  # layers without experts
    latent: Latent | None = None
    dtype: str = "bf16"  # of the linear layers' weights
    scale_block: tuple[int, int] | None = None  # rows and columns of a weight that share a scale

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` has experts instead of one FFN."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def rotary_dim(self) -> int:
        """Width of the rotary embedding."""
        return self.latent.rope_dim if self.latent else self.head_dim

    def layer_kinds(self) -> dict[int, int]:
        """One representative layer of each kind → number of such layers."""
        kinds: dict[bool, int] = {}
        counts: dict[int, int] = {}
        for layer in range(self.num_layers):
            representative = kinds.setdefault(self.is_moe(layer), layer)
            counts[representative] = counts.get(representative, 0) + 1
        return counts


def built_in_names() -> list[str]:
    return sorted(path.stem for path in BUILT_IN.glob("*.json"))


def load_model(model: str, dtype: str | None = None) -> ModelShape:
    """As `read_config`; `dtype` overrides the config's. Raises SidpUsageError in one line."""
    return shape_from_config(*read_config(model), dtype)


def read_config(model: str) -> tuple[dict[str, Any], str]:
    """Values and name of a config. `model`: a built-in name (in any case, with or without its
    organisation), a config.json or its folder. Raises SidpUsageError in one line."""
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        by_name = {name.lower(): name for name in built_in_names()}
        name = by_name.get(model.rsplit("/", 1)[-1].lower())
        if name is None:
            raise SidpUsageError(
                f"MODEL {model!r} is neither a config.json, nor a folder with one, nor built in: "
                f"give a path, or one of {', '.join(built_in_names())}"
            )
        path = BUILT_IN / f"{name}.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SidpUsageError(
            f"MODEL {model!r}: {path} can't be read as JSON ({error}): give a config.json"
        ) from error
    if not isinstance(config, dict):
        raise SidpUsageError(f"MODEL {model!r}: {path} holds no JSON object: give a config.json")
    return config, path.resolve().parent.name if path.name == "config.json" else path.stem


def shape_from_config(config: dict[str, Any], name: str, dtype: str | None = None) -> ModelShape:
    """Shape from the values of a config.json; raises SidpUsageError that names the field."""
    model_type = config.get("model_type")
    if model_type not in _DENSE + _MOE:
        raise SidpUsageError(
            f"model_type {model_type!r} of {name} is unknown to the planner: it knows "
            f"{', '.join(_DENSE + _MOE)}"
        )
    read = _Reader(config, name)
    heads = read.count("num_attention_heads")
    latent = _latent(read) if model_type in _LATENT else None
    biased = bool(config.get("attention_bias", False)) and latent is None
    dtype = dtype or _dtype(config, name)
    shape = ModelShape(
        name=name,
        model_type=model_type,
        num_layers=read.count("num_hidden_layers"),
        hidden_size=read.count("hidden_size"),
        intermediate_size=read.count("intermediate_size"),
        num_heads=heads,
        num_kv_heads=heads if latent else read.count("num_key_value_heads"),
        head_dim=latent.nope_dim + latent.rope_dim if latent else _head_dim(read, heads),
        vocab_size=read.count("vocab_size"),
        max_position=read.count("max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2"
        or (bool(config.get("qkv_bias", True)) if model_type == "qwen2_moe" else biased),
        o_bias=model_type not in ("qwen2", "qwen2_moe") and biased,
        ffn_bias=model_type == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        latent=latent,
        dtype=dtype,
        scale_block=_scale_block(config, name) if dtype == "fp8" else None,
    )
    if shape.num_heads % shape.num_kv_heads:
        raise SidpUsageError(
            f"num_attention_heads {heads} of {name} is no multiple of num_key_value_heads "
            f"{shape.num_kv_heads}: correct the config"
        )
    return _with_experts(shape, read) if model_type in _MOE else shape


def _head_dim(read: "_Reader", heads: int) -> int:
    if read.config.get("head_dim") is not None:
        return read.count("head_dim")
    hidden = read.count("hidden_size")
    if hidden % heads:
        raise SidpUsageError(
            f"hidden_size {hidden} of {read.name} is no multiple of num_attention_heads {heads}: "
            "give head_dim"
        )
    return hidden // heads


def _latent(read: "_Reader") -> Latent:
    return Latent(
        q_rank=read.whole("q_lora_rank", 0),
        kv_rank=read.count("kv_lora_rank"),
        nope_dim=read.count("qk_nope_head_dim"),
        rope_dim=read.count("qk_rope_head_dim"),
        value_dim=read.count("v_head_dim"),
    )


def _with_experts(shape: ModelShape, read: "_Reader") -> ModelShape:
    kind = shape.model_type
    expert_size = read.count("intermediate_size" if kind == "mixtral" else "moe_intermediate_size")
    shared_size = expert_size * read.whole("n_shared_experts", 0) if shape.latent else 0
    if kind == "qwen2_moe":
        shared_size = read.whole("shared_expert_intermediate_size")
    method = read.config.get("topk_method", "noaux_tc" if kind == "deepseek_v3" else None)
    shape = replace(
        shape,
        num_experts=read.count(_num_experts(shape, read.config)),
        experts_per_token=read.count("num_experts_per_tok"),
        expert_size=expert_size,
        shared_size=shared_size,
        shared_gate=kind == "qwen2_moe",
        router_bias=shape.latent is not None and method == "noaux_tc",
        dense_layers=_dense_layers(shape, read),
    )
    if shape.experts_per_token > shape.num_experts:
        raise SidpUsageError(
            f"num_experts_per_tok {shape.experts_per_token} of {shape.name} is more than its "
            f"{shape.num_experts} experts: correct the config"
        )
    return shape


def _num_experts(shape: ModelShape, config: dict[str, Any]) -> str:
    """The field that says it; transformers 5 writes `num_local_experts` for more than Mixtral."""
    if shape.model_type == "mixtral" or config.get("num_local_experts") is not None:
        return "num_local_experts"
    return "n_routed_experts" if shape.latent else "num_experts"


def _dense_layers(shape: ModelShape, read: "_Reader") -> tuple[int, ...]:
    """Layers of a mixture that have one FFN."""
    layers = range(shape.num_layers)
    if shape.latent:
        first, every = read.whole("first_k_dense_replace", 0), read.count("moe_layer_freq", 1)
        return tuple(layer for layer in layers if layer < first or layer % every)
    named, every = read.config.get("mlp_only_layers") or (), read.count("decoder_sparse_step", 1)
    return tuple(layer for layer in layers if layer in named or (layer + 1) % every)


def _dtype(config: dict[str, Any], name: str) -> str:
    """Float32 checkpoints count as bf16: SGLang loads them in 16 bits."""
    quantization = config.get("quantization_config")
    if not quantization:
        return "bf16"
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method == "fp8":
        return "fp8"
    raise SidpUsageError(
        f"quantization_config of {name} says {method!r}, which the planner does not know: "
        f"choose --dtype {' or '.join(DTYPES)}"
    )


def _scale_block(config: dict[str, Any], name: str) -> tuple[int, int] | None:
    """None where a tensor has one scale, as SGLang quantises by itself."""
    quantization = config.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(map(_is_count, block))):
        raise SidpUsageError(
            f"weight_block_size of {name} is {block!r}, not two whole numbers above 0: correct it"
        )
    return block[0], block[1]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class _Reader:
    config: dict[str, Any]
    name: str

    def count(self, field: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self._value(field, default)
        if not _is_count(value):
            raise SidpUsageError(
                f"{field} of {self.name} is {value!r}, not a whole number above 0: correct it"
            )
        return value

    def whole(self, field: str, default: int | None = None) -> int:
        """A whole number, 0 among them."""
        return 0 if self._value(field, default) == 0 else self.count(field, default)

    def _value(self, field: str, default: int | None) -> Any:
        value = self.config.get(field)
        if value is None:
            value = default
        if value is None:
            raise SidpUsageError(f"{field} is missing in the config of {self.name}: add it")
        return value

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
_MOE = ("qwen3_moe", "mixtral")


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only model; widths in elements. `intermediate_size` is that of dense layers,
    `expert_size` that of one expert; `num_experts` is 0 for a dense model."""

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
    sparse_step: int = 1  # every n-th layer has experts
    dense_layers: tuple[int, ...] = ()  # layers without experts
    dtype: str = "bf16"  # of the linear layers' weights

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` has experts instead of one FFN."""
        return (
            self.num_experts > 0
            and layer not in self.dense_layers
            and (layer + 1) % self.sparse_step == 0
        )

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
    heads, hidden = read.count("num_attention_heads"), read.count("hidden_size")
    head_dim = config.get("head_dim")
    if head_dim is None and hidden % heads:
        raise SidpUsageError(
            f"hidden_size {hidden} of {name} is no multiple of num_attention_heads {heads}: "
            "give head_dim"
        )
    shape = ModelShape(
        name=name,
        model_type=model_type,
        num_layers=read.count("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=read.count("intermediate_size"),
        num_heads=heads,
        num_kv_heads=read.count("num_key_value_heads"),
        head_dim=hidden // heads if head_dim is None else read.count("head_dim"),
        vocab_size=read.count("vocab_size"),
        max_position=read.count("max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2" or bool(config.get("attention_bias", False)),
        o_bias=model_type != "qwen2" and bool(config.get("attention_bias", False)),
        ffn_bias=model_type == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        dtype=dtype or _dtype(config, name),
    )
    if shape.num_heads % shape.num_kv_heads:
        raise SidpUsageError(
            f"num_attention_heads {heads} of {name} is no multiple of num_key_value_heads "
            f"{shape.num_kv_heads}: correct the config"
        )
    return _with_experts(shape, read) if model_type in _MOE else shape


def _with_experts(shape: ModelShape, read: "_Reader") -> ModelShape:
    mixtral = shape.model_type == "mixtral"
    shape = replace(
        shape,
        num_experts=read.count("num_local_experts" if mixtral else "num_experts"),
        experts_per_token=read.count("num_experts_per_tok"),
        expert_size=read.count("intermediate_size" if mixtral else "moe_intermediate_size"),
        sparse_step=read.count("decoder_sparse_step", 1),
        dense_layers=tuple(read.config.get("mlp_only_layers") or ()),
    )
    if shape.experts_per_token > shape.num_experts:
        raise SidpUsageError(
            f"num_experts_per_tok {shape.experts_per_token} of {shape.name} is more than its "
            f"{shape.num_experts} experts: correct the config"
        )
    return shape


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


@dataclass(frozen=True)
class _Reader:
    config: dict[str, Any]
    name: str

    def count(self, field: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.config.get(field, default)
        if value is None:
            raise SidpUsageError(f"{field} is missing in the config of {self.name}: add it")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SidpUsageError(
                f"{field} of {self.name} is {value!r}, not a whole number above 0: correct it"
            )
        return value

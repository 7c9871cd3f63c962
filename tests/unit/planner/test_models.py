"""Byte counts of the planner against real tensor shapes, and configs that it must refuse."""

import json
from pathlib import Path
from typing import Any

import pytest

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.planner.models import BUILT_IN, built_in_names, load_model, shape_from_config
from sidp_sgl.planner.weights import (
    Split,
    block_bytes,
    kv_bytes,
    layer_weights,
    num_parameters,
    padded_vocab,
    part_bytes,
)

PUBLISHED = {  # billions of parameters, from the model cards
    "Llama-3.1-405B": 405.85,
    "Llama-3.1-70B": 70.55,
    "Llama-3.1-8B": 8.03,
    "Mixtral-8x7B": 46.70,
    "Qwen2.5-72B": 72.71,
    "Qwen3-14B": 14.77,
    "Qwen3-235B-A22B": 235.09,
    "Qwen3-30B-A3B": 30.53,
    "Qwen3-32B": 32.76,
    "Qwen3-4B": 4.02,
    "Qwen3-8B": 8.19,
}
PARTS = {  # the first that occurs in a tensor's name
    "embed_tokens": "embedding",
    "lm_head": "lm_head",
    "norm": "norms",
    "self_attn": "attention",
    "experts": "experts",
    "mlp.gate.": "router",
    "mlp": "ffn",
}


def part_of(tensor_name: str) -> str:
    return next(part for word, part in PARTS.items() if word in tensor_name)


@pytest.mark.parametrize("name", built_in_names())
def test_parts_equal_the_tensors_that_transformers_makes(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(BUILT_IN / f"{name}.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    real = dict.fromkeys(set(PARTS.values()), 0)
    layers: dict[str, int] = {}
    for tensor_name, tensor in model.named_parameters():
        part = part_of(tensor_name)
        real[part] += 2 * tensor.numel()
        if ".layers.3." in tensor_name:
            layers[part] = layers.get(part, 0) + 2 * tensor.numel()

    shape = load_model(name)
    parts = part_bytes(shape, Split())
    assert {part: getattr(parts, part) for part in real} == real
    assert parts.total - parts.rotary == sum(real.values())
    ffn = layers.get("ffn", 0) + layers.get("experts", 0)
    assert block_bytes(shape, 3, Split(), "ffn") == ffn
    assert block_bytes(shape, 3, Split(), "linear") == ffn + layers["attention"]
    head_dim = model.model.layers[0].self_attn.head_dim
    expected_kv = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    assert kv_bytes(shape, 1, "bf16") == expected_kv


@pytest.mark.parametrize("name", built_in_names())
def test_totals_are_those_published(name: str) -> None:
    assert num_parameters(load_model(name)) / 1e9 == pytest.approx(PUBLISHED[name], abs=0.006)


@pytest.mark.parametrize("name", built_in_names())
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_shards_hold_the_model_once(name: str, tp: int) -> None:
    """But for what SGLang replicates: norms, router, KV heads where there are more GPUs."""
    shape = load_model(name)
    whole, shard = part_bytes(shape, Split()), part_bytes(shape, Split.of(tp))
    assert tp * (shard.ffn + shard.experts) == whole.ffn + whole.experts
    assert shard.norms == whole.norms and shard.router == whole.router
    assert tp * shard.embedding >= whole.embedding
    if tp <= shape.num_kv_heads:
        assert tp * shard.attention == whole.attention
        assert tp * kv_bytes(shape, tp, "bf16") == kv_bytes(shape, 1, "bf16")
    else:
        assert tp * shard.attention > whole.attention
        assert kv_bytes(shape, tp, "bf16") == kv_bytes(shape, shape.num_kv_heads, "bf16")


def test_fp8_halves_the_linear_layers_only() -> None:
    bf16, fp8 = (part_bytes(load_model("Qwen2.5-72B", dtype), Split()) for dtype in ("bf16", "fp8"))
    assert fp8.ffn * 2 == bf16.ffn
    biases = 80 * 2 * (64 + 2 * 8) * 128  # of qkv, in 16 bits
    assert (fp8.attention - biases) * 2 == bf16.attention - biases
    assert (fp8.embedding, fp8.lm_head, fp8.norms) == (bf16.embedding, bf16.lm_head, bf16.norms)


@pytest.mark.parametrize(
    ("vocab", "tp", "rows"), [(151936, 8, 151936), (32000, 3, 32064), (100, 1, 128), (100, 3, 192)]
)
def test_vocabulary_is_padded_as_in_sglang(vocab: int, tp: int, rows: int) -> None:
    assert padded_vocab(vocab, tp) == rows


def test_block_sizes_are_the_engine_s() -> None:
    import torch

    from sidp_sgl.weightpool import layout

    shape = shape_from_config({**config(), "model_type": "qwen2"}, "small")
    layer = layer_weights(shape, 0, Split())
    tensors = []
    for gemm in (layer.qkv, layer.o, layer.gate_up, layer.down):
        tensors.append(torch.empty(gemm.out_width, gemm.in_width, dtype=torch.bfloat16))
        tensors += [torch.empty(gemm.out_width, dtype=torch.bfloat16)] * gemm.has_bias
    packed = layout.make_layout((str(i), tensor) for i, tensor in enumerate(tensors))
    assert block_bytes(shape, 0, Split(), "linear") == packed.num_bytes


def config(**values: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 128,
        **values,
    }


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "deepseek_v3"}, "model_type 'deepseek_v3'"),
        ({"model_type": None}, "model_type None"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers of it is 0"),
        ({"hidden_size": "40"}, "hidden_size of it is '40'"),
        ({"hidden_size": 42}, "give head_dim"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads"),
        ({"quantization_config": {"quant_method": "awq"}}, "--dtype"),
        ({"model_type": "mixtral"}, "num_local_experts is missing"),
        (
            {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok 3",
        ),
    ],
)
def test_a_config_that_can_t_be_planned_is_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(SidpUsageError) as failure:
        shape_from_config(config(**values), "it")
    assert named in str(failure.value) and "\n" not in str(failure.value)


def test_a_folder_and_a_path_and_a_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config()))
    assert load_model(str(tmp_path)) == load_model(str(tmp_path / "config.json"))
    assert load_model(str(tmp_path)).name == tmp_path.name
    assert load_model("meta-llama/llama-3.1-70b").name == "Llama-3.1-70B"
    with pytest.raises(SidpUsageError, match="Qwen3-32B"):
        load_model("Qwen33")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SidpUsageError, match="no JSON object"):
        load_model(str(tmp_path))


def test_layers_without_experts() -> None:
    moe = config(
        model_type="qwen3_moe",
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        decoder_sparse_step=2,
        num_hidden_layers=6,
        mlp_only_layers=[3],
    )
    shape = shape_from_config(moe, "it")
    assert [shape.is_moe(layer) for layer in range(6)] == [False, True, False, False, False, True]
    assert shape.layer_kinds() == {0: 4, 1: 2}
    parts = part_bytes(shape, Split())
    assert parts.ffn == 4 * 3 * 40 * 72 * 2 and parts.experts == 2 * 8 * 3 * 40 * 16 * 2

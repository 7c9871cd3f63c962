"""Byte counts of the planner against real tensor shapes, and configs that it must refuse."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.planner.models import (
    BUILT_IN,
    ModelShape,
    built_in_names,
    load_model,
    shape_from_config,
)
from sidp_sgl.planner.weights import (
    Gemm,
    Split,
    block_bytes,
    check_split,
    kv_bytes,
    num_parameters,
    padded_vocab,
    part_bytes,
)

PUBLISHED = {  # billions of parameters, from the model cards
    "DeepSeek-V3": 671.03,
    "Llama-3.1-405B": 405.85,
    "Llama-3.1-70B": 70.55,
    "Llama-3.1-8B": 8.03,
    "Mixtral-8x7B": 46.70,
    "Qwen2.5-72B": 72.71,
    "Qwen3-14B": 14.77,
    "Qwen3-235B-A22B": 235.09,
    "Qwen3-235B-A22B-FP8": 235.09,
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
    "shared_expert_gate": "router",
    "shared_expert": "ffn",
    "experts": "experts",
    "mlp.gate.": "router",
    "mlp": "ffn",
}


def part_of(tensor_name: str) -> str:
    return next(part for word, part in PARTS.items() if word in tensor_name)


@pytest.mark.parametrize("name", built_in_names())
def test_parts_equal_the_tensors_that_transformers_makes(name: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(BUILT_IN / f"{name}.json")
    vars(config).pop("quantization_config", None)  # the tensors of 16 bits are compared
    check_parts(load_model(name, "bf16"), config)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2"])
def test_parts_of_other_mixtures(architecture: str) -> None:
    from tests.support.checkpoints import ARCHITECTURES, SETTINGS

    values = {
        **config(num_hidden_layers=4, hidden_size=64, vocab_size=320),
        **SETTINGS[architecture],
    }
    made = ARCHITECTURES[architecture][0](**{k: v for k, v in values.items() if k != "model_type"})
    check_parts(shape_from_config({**values, "model_type": architecture}, "small"), made)


def check_parts(shape: ModelShape, config: Any) -> None:
    """Layer 3 has experts, if any layer has."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    real = dict.fromkeys(set(PARTS.values()), 0)
    layers: dict[str, int] = {}
    for tensor_name, tensor in model.named_parameters():
        part = part_of(tensor_name)
        real[part] += 2 * tensor.numel()
        if ".layers.3." in tensor_name:
            layers[part] = layers.get(part, 0) + 2 * tensor.numel()
    for tensor_name, tensor in model.named_buffers():
        if "e_score_correction_bias" in tensor_name:
            real["router"] += 4 * tensor.numel()

    parts = part_bytes(shape, Split())
    assert {part: getattr(parts, part) for part in real} == real
    assert parts.total - parts.rotary - parts.absorbed == sum(real.values())
    ffn = layers.get("ffn", 0) + layers.get("experts", 0)
    assert block_bytes(shape, 3, Split(), "ffn") == ffn
    pooled = 0 if shape.latent else layers["attention"]
    assert block_bytes(shape, 3, Split(), "linear") == ffn + pooled
    attention = model.model.layers[0].self_attn
    if shape.latent:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        assert parts.absorbed == 2 * shape.num_layers * attention.kv_b_proj.weight.numel()
    else:
        width = 2 * config.num_key_value_heads * attention.head_dim
    assert kv_bytes(shape, 1, "bf16") == 2 * config.num_hidden_layers * width


@pytest.mark.parametrize("name", built_in_names())
def test_totals_are_those_published(name: str) -> None:
    assert num_parameters(load_model(name)) / 1e9 == pytest.approx(PUBLISHED[name], abs=0.006)


@pytest.mark.parametrize("name", built_in_names())
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_shards_hold_the_model_once(name: str, tp: int) -> None:
    """But for what SGLang replicates: norms, router, KV heads where there are more GPUs."""
    shape = load_model(name, "bf16")
    whole, shard = part_bytes(shape, Split()), part_bytes(shape, Split.of(tp))
    assert tp * (shard.ffn + shard.experts) == whole.ffn + whole.experts
    assert shard.norms == whole.norms and shard.router == whole.router
    assert tp * shard.embedding >= whole.embedding
    if shape.latent:
        assert tp * shard.attention > whole.attention and tp * shard.absorbed == whole.absorbed
        assert kv_bytes(shape, tp, "bf16") == kv_bytes(shape, 1, "bf16")
    elif tp <= shape.num_kv_heads:
        assert tp * shard.attention == whole.attention
        assert tp * kv_bytes(shape, tp, "bf16") == kv_bytes(shape, 1, "bf16")
    else:
        assert tp * shard.attention > whole.attention
        assert kv_bytes(shape, tp, "bf16") == kv_bytes(shape, shape.num_kv_heads, "bf16")


@pytest.mark.parametrize("name", ["Qwen3-235B-A22B", "DeepSeek-V3"])
def test_whole_experts_take_what_slices_of_them_take(name: str) -> None:
    shape = load_model(name)
    sliced, whole = (part_bytes(shape, Split(1, 8, 1, 8, experts)) for experts in (1, 8))
    assert sliced.experts == pytest.approx(whole.experts, rel=1e-4)  # scales of partial blocks
    assert replace(sliced, experts=0) == replace(whole, experts=0)


def test_fp8_halves_the_linear_layers_only() -> None:
    bf16, fp8 = (part_bytes(load_model("Qwen2.5-72B", dtype), Split()) for dtype in ("bf16", "fp8"))
    assert fp8.ffn * 2 == bf16.ffn
    biases = 80 * 2 * (64 + 2 * 8) * 128  # of qkv, in 16 bits
    assert (fp8.attention - biases) * 2 == bf16.attention - biases
    assert (fp8.embedding, fp8.lm_head, fp8.norms) == (bf16.embedding, bf16.lm_head, bf16.norms)


def test_scales_of_fp8_blocks() -> None:
    blocks = load_model("Qwen3-235B-A22B-FP8")
    tensors = replace(blocks, scale_block=None)
    assert load_model("Qwen3-235B-A22B", "fp8") == replace(tensors, name="Qwen3-235B-A22B")
    with_scales, without = (part_bytes(shape, Split()) for shape in (blocks, tensors))
    assert with_scales.experts == without.experts * (1 + 4 / 128**2)
    assert with_scales.attention == without.attention * (1 + 4 / 128**2)
    assert replace(with_scales, experts=0, attention=0) == replace(without, experts=0, attention=0)


def test_a_scale_block_is_not_cut() -> None:
    shape = load_model("Qwen3-235B-A22B-FP8")
    check_split(shape, Split.of(4))
    check_split(shape, Split(1, 8, 1, 8, experts=8))
    check_split(replace(shape, scale_block=None), Split.of(8))
    with pytest.raises(SidpUsageError, match=r"--tp 8 .* 1536 FFN columns .* in blocks of 128"):
        check_split(shape, Split.of(8))


@given(
    st.integers(1, 600), st.integers(1, 600), st.integers(1, 4),
    st.one_of(st.none(), st.sampled_from([(128, 128), (1, 128), (64, 32)])), st.booleans(),
)  # fmt: skip
def test_a_linear_layer_lies_in_a_block_as_the_engine_lays_it(
    in_width: int,
    out_width: int,
    copies: int,
    scale_block: tuple[int, int] | None,
    has_bias: bool,
) -> None:
    import torch

    from sidp_sgl.weightpool import layout

    dtype = torch.float8_e4m3fn if scale_block else torch.bfloat16
    with torch.device("meta"):
        tensors = [torch.empty(copies, out_width, in_width, dtype=dtype)]
        tensors += [torch.empty(copies, out_width, dtype=torch.bfloat16)] * has_bias
        if scale_block:
            rows, columns = (
                -(-w // b) for w, b in zip((out_width, in_width), scale_block, strict=True)
            )
            tensors.append(torch.empty(copies, rows, columns, dtype=torch.float32))
    packed = layout.make_layout((str(i), tensor) for i, tensor in enumerate(tensors))
    kind = "fp8" if scale_block else "bf16"
    gemm = Gemm(in_width, out_width, has_bias, copies, kind, scale_block)
    assert gemm.block_bytes == packed.num_bytes
    assert gemm.num_bytes == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    ("vocab", "tp", "rows"), [(151936, 8, 151936), (32000, 3, 32064), (100, 1, 128), (100, 3, 192)]
)
def test_vocabulary_is_padded_as_in_sglang(vocab: int, tp: int, rows: int) -> None:
    assert padded_vocab(vocab, tp) == rows


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
        ({"model_type": "deepseek_v4"}, "model_type 'deepseek_v4'"),
        ({"model_type": "deepseek_v3"}, "kv_lora_rank is missing"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            "weight_block_size of it is [128]",
        ),
        (
            {
                "model_type": "qwen2_moe",
                "moe_intermediate_size": 8,
                "shared_expert_intermediate_size": -1,
            },
            "shared_expert_intermediate_size of it is -1",
        ),
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
    written_by_transformers_5 = {"num_local_experts": moe.pop("num_experts"), **moe}
    assert shape_from_config(written_by_transformers_5, "it") == shape
    assert [shape.is_moe(layer) for layer in range(6)] == [False, True, False, False, False, True]
    assert shape.layer_kinds() == {0: 4, 1: 2}
    parts = part_bytes(shape, Split())
    assert parts.ffn == 4 * 3 * 40 * 72 * 2 and parts.experts == 2 * 8 * 3 * 40 * 16 * 2


def test_layers_of_deepseek() -> None:
    values = config(
        **{"model_type": "deepseek_v2", "kv_lora_rank": 8, "qk_nope_head_dim": 8},
        **{"qk_rope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 16},
        **{"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": None},
        **{"first_k_dense_replace": 2, "moe_layer_freq": 2, "num_hidden_layers": 6},
    )
    shape = shape_from_config(values, "it")
    assert [shape.is_moe(layer) for layer in range(6)] == [False, False, True, False, True, False]
    assert shape.latent is not None and shape.latent.q_rank == 0
    assert (shape.shared_size, shape.router_bias) == (0, False)
    shared = shape_from_config(values | {"n_shared_experts": 2, "topk_method": "noaux_tc"}, "it")
    assert (shared.shared_size, shared.router_bias) == (32, True)

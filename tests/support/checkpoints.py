"""Tiny seeded checkpoints of real architectures; every tensor of every layer differs.

Written with transformers, so that SGLang's real loader reads real files.
"""

from pathlib import Path

import torch
import transformers

ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def write_checkpoint(
    folder: Path,
    architecture: str,
    *,
    num_layers: int,
    tie_embeddings: bool = False,
    hidden_size: int = 64,
    intermediate_size: int = 192,
    vocab_size: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_bytes: int = 400_000,
) -> Path:
    """Write config.json and several safetensors shards into `folder` and return it.

    Shards are small on purpose: a pooled unit and a replicated tensor share a file.
    """
    config_class, model_class = ARCHITECTURES[architecture]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=tie_embeddings,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype=dtype,
    )
    model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_bytes)
    return folder

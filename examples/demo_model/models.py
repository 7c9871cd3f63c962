# SPDX-License-Identifier: Apache-2.0
"""The demo models: a dense Qwen3, and a mixture of experts that starts from its weights; and how
they are stored, with a tokenizer of one token per character."""

import copy
import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

PAD, UNK, EOS = "<pad>", "<unk>", "\n"
VOCABULARY = [PAD, UNK, EOS, *" 0123456789+-*=;,.:?abcdefghijklmnopqrstuvwxyz"]
TOKEN_ID = {token: i for i, token in enumerate(VOCABULARY)}
# A chat is answered as if its last user message were the plain prompt.
CHAT_TEMPLATE = (
    "{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{{- users[-1]['content'] -}}"
)
MAX_POSITIONS = 2048
COMMON = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": TOKEN_ID[EOS],
    "pad_token_id": TOKEN_ID[PAD],
    "attn_implementation": "eager",  # the quickest one to train on a CPU at these lengths
}
CHOSEN, WIDTH = 4, 96  # experts of a token, out of twice as many; neurons of an expert
ROUTER_SCALE = 0.1


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; the newline ends a generation."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_ID, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_dense() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**COMMON))


@torch.no_grad()
def build_mixture(dense: Qwen3ForCausalLM) -> Qwen3MoeForCausalLM:
    """Sparse upcycling: each layer's largest neurons are dealt out to CHOSEN experts, which are
    there twice, with as much noise. The router's rows of the two are each other's negative, so that
    of each pair exactly one is chosen: together all of these neurons, as in the dense model."""
    mixture = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **COMMON,
            num_experts=2 * CHOSEN,
            num_experts_per_tok=CHOSEN,
            moe_intermediate_size=WIDTH,
            norm_topk_prob=True,
        )
    )
    mixture.load_state_dict(dense.state_dict(), strict=False)  # all but the FFNs
    for layer, dense_layer in zip(mixture.model.layers, dense.model.layers, strict=True):
        ffn = dense_layer.mlp
        gate, up, down = ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight.T
        sizes = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=1)
        largest = sizes.argsort(descending=True)[: CHOSEN * WIDTH]
        neurons = largest.view(WIDTH, CHOSEN).T.repeat(2, 1)  # by expert
        experts = layer.mlp.experts
        experts.gate_up_proj.copy_(torch.cat([gate[neurons], up[neurons]], dim=1))
        experts.down_proj.copy_(CHOSEN * down[neurons].mT)  # their weights' sum is 1
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight += weight.std() * torch.randn_like(weight)
        rows = ROUTER_SCALE * torch.randn(CHOSEN, dense.config.hidden_size)
        layer.mlp.gate.weight.copy_(torch.cat([rows, -rows]))
    return mixture


def save_checkpoint(model: PreTrainedModel, folder: Path) -> None:
    stored = copy.deepcopy(model).to(torch.bfloat16)
    if isinstance(stored, Qwen3MoeForCausalLM):  # SGLang reads a head for it, tied or not
        stored.lm_head.weight = torch.nn.Parameter(stored.lm_head.weight.clone())
        stored.config.tie_word_embeddings = False
    stored.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder, save_jinja_files=False)
    # Readers of the older configuration format look for these names.
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    config |= {"torch_dtype": "bfloat16", "rope_theta": config["rope_parameters"]["rope_theta"]}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer_file = folder / "tokenizer_config.json"
    tokenizer_config = json.loads(tokenizer_file.read_text())
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer_file.write_text(json.dumps(tokenizer_config, indent=2, sort_keys=True) + "\n")

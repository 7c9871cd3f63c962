"""The mixture begins with the dense model's neurons: of each pair of experts a token takes one. It
is stored with a head of its own."""

from pathlib import Path

import torch
from safetensors import safe_open

from examples.demo_model.models import CHOSEN, build_dense, build_mixture, save_checkpoint


def test_a_token_takes_one_expert_of_each_pair() -> None:
    torch.manual_seed(0)
    dense = build_dense()
    mixture = build_mixture(dense)
    tokens = torch.randint(dense.config.vocab_size, (2, 64))
    chosen = []
    for layer in mixture.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: chosen.append(output[-1]))
    mixture(input_ids=tokens)
    assert len(chosen) == dense.config.num_hidden_layers
    pairs = torch.cat(chosen) % CHOSEN
    assert (pairs.sort(-1).values == torch.arange(CHOSEN)).all()
    assert torch.cat(chosen).flatten().bincount(minlength=2 * CHOSEN).min() > 0
    attention, dense_attention = (
        model.model.layers[5].self_attn.q_proj.weight for model in (mixture, dense)
    )
    assert torch.equal(attention, dense_attention)


def test_a_head_is_stored_for_sglang_ties_none_of_this_architecture(tmp_path: Path) -> None:
    mixture = build_mixture(build_dense())
    save_checkpoint(mixture, tmp_path)
    assert mixture.config.tie_word_embeddings
    committed = Path(__file__).parents[3] / "examples" / "demo_model" / "moe"
    for folder in (tmp_path, committed):
        with safe_open(folder / "model.safetensors", "pt") as tensors:
            head = tensors.get_tensor("lm_head.weight")
            assert torch.equal(head, tensors.get_tensor("model.embed_tokens.weight"))

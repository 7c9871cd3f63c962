"""What the CPU platform adds to SGLang's models."""

import torch
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry

from sidp_sgl.sglang_hooks.cpu import models


def test_the_shared_experts_gate_adds_in_place() -> None:
    rows, weight = torch.randn(3, 8).bfloat16(), torch.randn(8).bfloat16()
    shared, result = torch.randn(3, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    before = result.clone()
    models._gate_sigmoid_mul_add(None, rows, weight, shared, result)
    gate = torch.sigmoid((rows.float() * weight.float()).sum(-1, keepdim=True))
    expected = (before.float() + gate * shared.float()).bfloat16()
    assert torch.allclose(result.float(), expected.float(), atol=0.05)
    assert not torch.equal(result, before)


def test_latent_attention_is_absorbed_on_torch_native() -> None:
    triton = AttentionBackendRegistry.get_handler("triton")
    models.register_mla()
    assert AttentionBackendRegistry.get_handler("torch_native") is not triton

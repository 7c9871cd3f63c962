"""What some of SGLang's models lack on a CPU without sgl_kernel and Triton."""

import torch
from sglang.srt.models.deepseek_common import attention_backend_handler
from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks.required import Hook


def _gate_sigmoid_mul_add(
    original: object,
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """SGLang's kernel of that name: adds sigmoid(hidden_states · gate_weight) · shared_output to
    `final_hidden_states` in place."""
    gate = torch.sigmoid(hidden_states.float() @ gate_weight.float()).unsqueeze(-1)
    final_hidden_states.copy_(gate * shared_output.float() + final_hidden_states.float())


HOOKS = [
    Hook(
        "sglang.srt.models.qwen2_moe.fused_gate_sigmoid_mul_add",
        _gate_sigmoid_mul_add,
        HookType.AROUND,
    ),
]


def register_mla() -> None:
    """torch_native attends to what lies in the KV cache, which for MLA is the latent: always the
    absorbed way, also in a prefill without a prefix."""
    attention_backend_handler.AttentionBackendRegistry.register(
        "torch_native", attention_backend_handler._dispatch_mla_subtype
    )

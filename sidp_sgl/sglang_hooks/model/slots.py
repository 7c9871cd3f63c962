"""How many slots a rank has: what the user says, or what the model's blocks need."""

from typing import Any

from sidp_sgl.config import SidpConfig
from sidp_sgl.weightpool.placement import DEFAULT_SLOTS, EXPERT_SLOTS

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # of Hugging Face configs


def num_slots(config: SidpConfig, hf_config: Any) -> int:
    """Of a rank with the model that `hf_config` describes."""
    return config.sidp_cache_slots or (EXPERT_SLOTS if has_experts(hf_config) else DEFAULT_SLOTS)


def has_experts(hf_config: Any) -> bool:
    """Whether layers of the model are mixtures."""
    return any((getattr(hf_config, name, None) or 0) > 1 for name in _NUM_EXPERTS)

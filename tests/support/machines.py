"""Calibration files whose threshold is known beforehand."""

import json
from pathlib import Path
from typing import Any

from sidp_sgl.planner.machine import Machine

LAYERS = 8
_FAST = 1e18  # nothing takes time but requests and fetches
_REQUEST_SECONDS = 1e-3
MODEL: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
}


def write_calibration(
    folder: Path, *, threshold: int, num_ranks: int = 2, num_layers: int = LAYERS
) -> Path:
    """Every request takes a millisecond of a step, and the fetches of a step so long that steps
    of `threshold` requests hide them and smaller ones don't. Fetches take no time but their
    overhead, so the threshold is the same for any widths."""
    fetch = (threshold - 0.5) * _REQUEST_SECONDS
    machine = Machine(
        name="a machine",
        memory_bytes=1 << 30,
        hbm_bandwidth=_FAST,
        kv_bandwidth=_FAST,
        bf16_flops=_FAST,
        fp8_flops=_FAST,
        link_bandwidth=_FAST,
        kernel_seconds=0.0,
        layer_seconds=0.0,
        collective_seconds=0.0,
        copy_seconds=fetch / (num_layers - num_layers // num_ranks),
        round_trip_seconds=0.0,
        step_seconds=0.0,
        request_seconds=_REQUEST_SECONDS,
    )
    path = folder / "calibration.json"
    path.write_text(json.dumps(machine.as_json()))
    return path

"""Which devices --sidp runs on, and with which CUDA graphs."""

import os
from typing import Any

import torch

from sidp_sgl.config import SidpConfig
from sidp_sgl.errors import SidpUsageError

ONE_DEVICE = "SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS"


def check_device(cfg: Any, config: SidpConfig) -> None:
    """Raise SidpUsageError for a device, or CUDA graphs, that --sidp does not run on."""
    if cfg.device not in ("cpu", "cuda"):
        raise SidpUsageError(f"--sidp does not run on --device {cfg.device}: use cuda or cpu")
    if cfg.device == "cpu" and config.sidp_colocate:
        raise SidpUsageError(
            "--sidp-colocate puts all ranks on one GPU, and --device cpu has none: drop it"
        )
    if cfg.device != "cuda":
        return
    if config.sidp_colocate and cfg.tp_size > 1:
        raise SidpUsageError(
            f"--sidp-colocate puts all ranks on one GPU, where --tp-size {cfg.tp_size} can't sum: "
            "use --tp-size 1, or drop --sidp-colocate"
        )
    if os.environ.get(ONE_DEVICE, "0").lower() in ("1", "true"):
        raise SidpUsageError(
            f"{ONE_DEVICE} does not work with --sidp: ranks map one another's memory; unset it"
        )
    graphs = cfg.cuda_graph_config
    if graphs.prefill.backend != "disabled":
        raise SidpUsageError(
            f"--sidp does not work with prefill CUDA graphs yet ({graphs.prefill.backend}): add "
            "--cuda-graph-backend-prefill=disabled"
        )
    if graphs.decode.backend not in ("full", "disabled"):
        raise SidpUsageError(
            f"--sidp does not work with {graphs.decode.backend} decode CUDA graphs: add "
            "--cuda-graph-backend-decode=full"
        )
    if not has_gpu():
        raise SidpUsageError(
            "--device cuda: PyTorch finds no GPU: use --device cpu, or see what nvidia-smi says"
        )


def has_gpu() -> bool:
    return torch.cuda.is_available()

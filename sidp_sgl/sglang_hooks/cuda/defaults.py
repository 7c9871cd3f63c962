"""Settings that --sidp changes on GPUs where the user has set none.

What the user gave stays, and is refused elsewhere where it can't work.
"""

from typing import Any

from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.utils.common import get_device_memory_capacity

from sidp_sgl.sglang_hooks import arguments

_LARGE_GPU_MIB = 60 * 1024
_LARGE_GPU_BATCH = 512  # of decode graphs; SGLang has 256 where weights are not sharded


def defaults(cfg: Any, gpu_mib: float | None) -> dict[str, Any]:
    """Fields to declare. `cfg`: the arguments as resolved so far; `gpu_mib`: a rank's memory."""
    declared: dict[str, Any] = {}
    if not cfg.sleep_on_idle:
        # A scheduler that spins keeps the interpreter from the threads that serve other ranks.
        declared["sleep_on_idle"] = True
    if cfg.cuda_graph_backend_prefill is None:
        declared["cuda_graph_backend_prefill"] = "disabled"
    has_batches = cfg.cuda_graph_max_bs_decode is not None or cfg.cuda_graph_bs_decode is not None
    if not has_batches and gpu_mib is not None and gpu_mib >= _LARGE_GPU_MIB:
        largest = cfg.max_running_requests or _LARGE_GPU_BATCH
        declared["cuda_graph_max_bs_decode"] = min(largest, _LARGE_GPU_BATCH)
    return declared


def _declare(server_args: Any, previous: Any) -> None:
    cfg = resolving_view(server_args)
    config = arguments.config_of(server_args)
    if config is not None and cfg.device == "cuda":
        gpu_mib = get_device_memory_capacity(cfg.device)
        if gpu_mib is not None and config.sidp_colocate:
            gpu_mib /= cfg.dp_size
        declare_resolution(server_args, "sidp", **defaults(cfg, gpu_mib))
    previous(server_args)


def install() -> None:
    """Inert for engines without --sidp."""
    register_resolution_hook("handle_cuda_graph_config")(_declare)

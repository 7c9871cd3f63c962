"""The command lines that start what is compared."""

from pathlib import Path

from sidp_sgl.config import AUTO, FFN, SidpConfig
from sidp_sgl.planner.deployment import DP_ATTENTION, REPLICAS, SIDP
from sidp_sgl.planner.plan.comparison import Estimate

_SERVER = "python -m sglang.launch_server"
_KV_DTYPES = {"fp8": "fp8_e4m3"}


def start_command(estimate: Estimate, model: str) -> str | None:
    """For an estimate of `model`, as the planner was given it; None for a kind that takes more than
    flags."""
    deployment = estimate.deployment
    node, kind = deployment.node, deployment.kind
    if kind not in (REPLICAS, DP_ATTENTION, SIDP):
        return None
    tp = node.num_gpus if kind == DP_ATTENTION else deployment.tp
    flags = {"--model-path": _folder(model), "--tp-size": tp, "--dp-size": deployment.dp}
    if kind == DP_ATTENTION:
        flags["--enable-dp-attention"] = ""
        if node.shape.num_experts:
            flags["--ep-size"] = node.num_gpus
    if kind == SIDP:
        default = SidpConfig()
        flags["--sidp"] = ""
        for flag, value, usual in (
            ("--sidp-mode", deployment.mode, AUTO),
            ("--sidp-pool", node.pool, FFN),
            ("--sidp-placement", node.placement, default.sidp_placement),
            ("--sidp-cache-slots", node.slots, default.sidp_cache_slots),
        ):
            if value != usual:
                flags[flag] = value
    flags["--mem-fraction-static"] = f"{node.mem_fraction:g}"
    if node.kv_dtype in _KV_DTYPES:
        flags["--kv-cache-dtype"] = _KV_DTYPES[node.kv_dtype]
    if estimate.batch < estimate.fitting:
        # Of a rank; with DP attention SGLang divides it.
        ranks = deployment.dp if kind == DP_ATTENTION else 1
        flags["--max-running-requests"] = estimate.batch * ranks
    words = [f"{name} {value}".rstrip() for name, value in flags.items() if value != 1]
    return " ".join([_SERVER, *words])


def _folder(model: str) -> str:
    """Of the checkpoint; a built-in model stands for one that the planner has not seen."""
    path = Path(model)
    if not path.exists():
        return "CHECKPOINT"
    return str(path if path.is_dir() else path.parent)

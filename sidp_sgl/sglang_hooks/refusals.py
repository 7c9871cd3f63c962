"""What --sidp does not work with yet: refused in one line, before anything is loaded.

One table of SGLang's flags, one list of run-time calls.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fastapi
from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_context

from sidp_sgl.config import SidpConfig
from sidp_sgl.errors import SidpUsageError
from sidp_sgl.sglang_hooks import arguments
from sidp_sgl.sglang_hooks.cuda.refusals import check_device
from sidp_sgl.sglang_hooks.model.headers import check_files
from sidp_sgl.sglang_hooks.model.slots import has_experts, num_slots
from sidp_sgl.sglang_hooks.required import Hook
from sidp_sgl.weightpool.placement import Placement

logger = logging.getLogger(__name__)


class Rule(NamedTuple):
    """A value of a ServerArgs field that is refused."""

    field: str
    is_refused: Callable[[Any], bool]
    flag: str
    reason: str


def more_than_one(value: Any) -> bool:
    return value is not None and int(value) > 1


RULES = [
    Rule("pp_size", more_than_one, "--pp-size", "pipeline parallelism is not supported yet"),
    Rule("ep_size", more_than_one, "--ep-size", "expert parallelism is not supported yet"),
    Rule("attn_dp_size", more_than_one, "--attn-dp-size", "DP attention shards the FFN itself"),
    Rule("enable_dp_attention", bool, "--enable-dp-attention", "it shards the FFN itself"),
    Rule("attn_cp_size", more_than_one, "--attn-cp-size", "context parallelism is not supported"),
    Rule("nnodes", more_than_one, "--nnodes", "the ranks of a group must share one node"),
    Rule("speculative_algorithm", bool, "--speculative-algorithm", "drafts are not supported yet"),
    Rule("enable_lora", bool, "--enable-lora", "adapters on pooled layers are not supported yet"),
    Rule("lora_paths", bool, "--lora-paths", "adapters on pooled layers are not supported yet"),
    Rule("enable_memory_saver", bool, "--enable-memory-saver", "peers read this rank's weights"),
    Rule("weight_cache_mode", lambda v: v not in (None, "off"), "--weight-cache-mode",
         "the weights are pooled already"),
    Rule("cpu_offload_gb", lambda v: bool(v and v > 0), "--cpu-offload-gb", "both move weights"),
    Rule("offload_group_size", lambda v: bool(v and v > 0), "--offload-group-size",
         "both move weights"),
    Rule("enable_torch_compile", bool, "--enable-torch-compile", "it would trace fixed weights"),
    Rule("enable_two_batch_overlap", bool, "--enable-two-batch-overlap",
         "two batches would share one slot"),
    Rule("enable_pdmux", bool, "--enable-pdmux", "two streams would share one slot"),
    Rule("enable_nvidia_megakernel", bool, "--enable-nvidia-megakernel", "it skips the units"),
    Rule("enable_eplb", bool, "--enable-eplb", "it moves experts that are pooled"),
    Rule("ep_num_redundant_experts", bool, "--ep-num-redundant-experts",
         "experts are pooled, not copied"),
    Rule("moe_a2a_backend", lambda v: v not in (None, "none"), "--moe-a2a-backend",
         "experts are pooled, not distributed"),
    Rule("kt_weight_path", bool, "--kt-weight-path", "both hold experts elsewhere"),
    Rule("dwdp_size", more_than_one, "--dwdp-size", "both distribute weights"),
    Rule("elastic_ep_backend", bool, "--elastic-ep-backend", "the group has a fixed size"),
    Rule("disaggregation_mode", lambda v: v not in (None, "null"), "--disaggregation-mode",
         "disaggregation is not supported yet"),
    Rule("encoder_only", bool, "--encoder-only", "there is no decoder to pool"),
    Rule("use_ray", bool, "--use-ray", "ranks must be processes of one launcher"),
    Rule("grpc_mode", bool, "--grpc-mode", "a lost rank could not be reported"),
    Rule("smg_grpc_mode", bool, "--smg-grpc-mode", "a lost rank could not be reported"),
    Rule("tokenizer_worker_num", more_than_one, "--tokenizer-worker-num",
         "a lost rank could not be reported to every worker"),
    Rule("load_format", lambda v: v not in (None, "auto", "safetensors"), "--load-format",
         "ranks read their own tensors from safetensors files only"),
    Rule("startup_weight_load_mode", lambda v: v == "overlap", "--startup-weight-load-mode",
         "each rank loads its own tensors"),
]  # fmt: skip

# Whose weights are parameters of the layers after loading, and nothing else.
QUANTISATIONS = (
    "fp8", "w8a8_fp8", "w8a8_int8", "awq", "awq_marlin", "gptq_marlin", "compressed-tensors",
)  # fmt: skip

# For which the CPU platform has products.
CPU_QUANTISATIONS = ("fp8", "w8a8_int8", "awq", "compressed-tensors")

# The same with --tp-size above 1.
TP_RULES = [
    Rule("enable_layernorm_sp", bool, "--enable-layernorm-sp",
         "with --tp-size above 1 it sums inside the pooled layers"),
    Rule("enable_symm_mem", bool, "--enable-symm-mem",
         "with --tp-size above 1 it allocates inside the pooled layers, in step with other ranks"),
]  # fmt: skip

# Calls of the tokenizer manager that would read or write whole weights at run time.
_WEIGHT_CALLS = [
    "begin_weight_update", "init_weights_update_group", "update_weights_from_disk",
    "update_weights_from_distributed", "update_weights_from_tensor", "update_weights_from_ipc",
    "get_weights_by_name", "release_memory_occupation", "resume_memory_occupation",
    "check_weights", "init_weights_send_group_for_remote_instance",
    "send_weights_to_remote_instance",
]  # fmt: skip


class CallRefused(fastapi.HTTPException, SidpUsageError):
    """A call that --sidp refuses at run time; HTTP status 400."""

    def __init__(self, reason: str) -> None:
        super().__init__(status_code=400, detail=reason)

    def __str__(self) -> str:
        return self.detail


def check_flags(server_args: Any, config: SidpConfig) -> None:
    """Raise SidpUsageError for the first flag that does not go with --sidp."""
    cfg = resolving_view(server_args)
    for rule in RULES + (TP_RULES if cfg.tp_size > 1 else []):
        value = getattr(cfg, rule.field, None)
        if rule.is_refused(value):
            raise SidpUsageError(
                f"{rule.flag} {value} does not work with --sidp: {rule.reason}; "
                f"drop {rule.flag} or --sidp"
            )
    if os.environ.get("SGLANG_RUST_SERVER", "0").lower() in ("1", "true"):
        raise SidpUsageError("SGLANG_RUST_SERVER does not work with --sidp: unset it")
    if cfg.dp_size < 2:
        raise SidpUsageError(
            f"--sidp needs --dp-size 2 or more, got {cfg.dp_size}: a single rank has nobody to "
            "share weights with"
        )


def check_model(server_args: Any, config: SidpConfig) -> None:
    """Raise SidpUsageError for a device, a model or slots that can't be pooled."""
    cfg = resolving_view(server_args)
    check_device(cfg, config)
    model = Path(cfg.model_path)
    if model.is_dir() and not any(model.glob("*.safetensors")):
        raise SidpUsageError(
            f"--model-path {model} holds no *.safetensors files, which --sidp reads tensor by "
            "tensor: convert the checkpoint, or drop --sidp"
        )
    if model.is_dir():
        check_files(model)
    model_config = model_config_of(server_args)
    check_quantisation(model_config, cfg.device)
    # As if all blocks were alike, before their sizes are known: one byte each.
    placement = Placement.of(
        [1] * model_config.num_hidden_layers,
        cfg.dp_size,
        num_slots(config, model_config.hf_text_config),
        config.sidp_placement,
    )
    check_slots(config, placement)
    warn_of_no_gain(placement)


def check_quantisation(model_config: Any, device: str) -> None:
    """Raise SidpUsageError for a quantised model whose weights can't be pooled, or multiplied."""
    method, model = model_config.quantization, model_config.model_path
    if method is None:
        return
    if method not in QUANTISATIONS:
        raise SidpUsageError(
            f"--model-path {model} is quantised by {method}, whose weights --sidp can't pool: use "
            f"{', '.join(QUANTISATIONS)} or an unquantised checkpoint, or drop --sidp"
        )
    if device != "cpu":
        return
    if method not in CPU_QUANTISATIONS:
        raise SidpUsageError(
            f"--model-path {model} is quantised by {method}, which does not run on --device cpu: "
            f"use {', '.join(CPU_QUANTISATIONS)} or an unquantised checkpoint"
        )
    settings = getattr(model_config.hf_config, "quantization_config", None) or {}
    if has_experts(model_config.hf_text_config) and not settings.get("weight_block_size"):
        raise SidpUsageError(
            f"--model-path {model} has experts quantised otherwise than by FP8 blocks, which does "
            "not run on --device cpu: use such a checkpoint, or an unquantised one"
        )
    groups = (settings.get("config_groups") or {}).values()
    if any(group["weights"]["num_bits"] != 8 for group in groups):
        raise SidpUsageError(
            f"--model-path {model} has weights of fewer than 8 bits by {method}, which do not run "
            "on --device cpu: use 8 bits, or an unquantised checkpoint"
        )


def check_slots(config: SidpConfig, placement: Placement) -> None:
    """Raise SidpUsageError where --sidp-cache-slots does not fit the model."""
    slots, most = config.sidp_cache_slots, placement.most_slots
    if slots is not None and slots > most:
        raise SidpUsageError(
            f"--sidp-cache-slots {slots} is out of range: with {placement.num_layers} layers and "
            f"{placement.num_ranks} ranks use 1 to {most}"
        )


def warn_of_no_gain(placement: Placement) -> None:
    """Say so where owned blocks and slots take as much memory as all the blocks would."""
    num_ranks = placement.num_ranks
    if min(map(placement.freed_bytes, range(num_ranks))) <= 0:
        most_owned = max(len(placement.owned(rank)) for rank in range(num_ranks))
        logger.warning(
            "--sidp frees no memory here: %d owned layers and %d slots of %d layers; "
            "use fewer --sidp-cache-slots or more ranks",
            most_owned,
            placement.num_slots,
            placement.num_layers,
        )


def _checked(check: Callable[[Any, SidpConfig], None]) -> Callable[[Any, Callable], None]:
    def step(server_args: Any, previous: Callable[[Any], None]) -> None:
        config = arguments.config_of(server_args)
        if config is not None:
            try:
                check(server_args, config)
            except SidpUsageError as error:
                if arguments.is_command_line(server_args):
                    arguments.exit_with(error)
                raise
        previous(server_args)

    return step


def _refuse_call(name: str) -> Callable:
    def refuse(original: Callable, *args: Any, **kwargs: Any) -> Any:
        if arguments.config_of(get_context().server_args) is not None:
            raise CallRefused(
                f"{name} is not supported with --sidp: weights are pooled and fixed; "
                "restart the engine with the new weights, or without --sidp"
            )
        return original(*args, **kwargs)

    refuse.__qualname__ = f"refuse_{name}"
    return refuse


def install() -> None:
    """Have SGLang's resolution run the checks; inert for engines without --sidp."""
    register_resolution_hook("handle_deprecated_dp_attention")(_checked(check_flags))
    register_resolution_hook("handle_other_validations")(_checked(check_model))


def runtime_hooks() -> list[Hook]:
    """Hooks of the main process that refuse to read or write whole weights at run time."""
    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    engine = "sglang.srt.entrypoints.engine.Engine"
    targets = [f"{manager}.{call}" for call in _WEIGHT_CALLS]
    targets += [f"{engine}.save_remote_model", f"{engine}.save_sharded_model"]
    return [Hook(t, _refuse_call(t.rpartition(".")[2]), HookType.AROUND) for t in targets]

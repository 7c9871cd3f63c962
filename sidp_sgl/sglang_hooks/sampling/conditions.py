"""With which of SGLang's flags TP ranks can share the sampling; decided in the main process."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

from sidp_sgl.config import AUTO, SEQUENCE_PARALLEL
from sidp_sgl.errors import SidpUsageError
from sidp_sgl.sglang_hooks import arguments
from sidp_sgl.sglang_hooks.refusals import Rule, more_than_one

logger = logging.getLogger(__name__)
SHARES_BY_ITSELF = ("cpu",)  # devices on which `auto` shares

RULES = [
    Rule("pp_size", more_than_one, "--pp-size", "pipeline parallelism is not supported yet"),
    Rule("attn_cp_size", more_than_one, "--attn-cp-size", "context parallelism is not supported"),
    Rule("enable_dp_attention", bool, "--enable-dp-attention", "its ranks have other rows"),
    Rule("speculative_algorithm", bool, "--speculative-algorithm", "drafts are verified whole"),
    Rule("dllm_algorithm", bool, "--dllm-algorithm", "it samples blocks"),
    Rule("disaggregation_mode", lambda v: v not in (None, "null"), "--disaggregation-mode",
         "disaggregation is not supported yet"),
    Rule("enable_torch_compile", bool, "--enable-torch-compile", "it would trace the gather"),
    Rule("enable_two_batch_overlap", bool, "--enable-two-batch-overlap",
         "the halves of a batch are sampled together"),
    Rule("sampling_backend", lambda v: v not in (None, "flashinfer", "pytorch"),
         "--sampling-backend", "it may need the whole batch"),
]  # fmt: skip

# Their forward pass goes on with the logits, at token ids of the whole vocabulary.
EDITING_MODELS = {"Gemma4UnifiedForConditionalGeneration"}


def obstacle(cfg: Any, models: Callable[[], Iterable[str]] = lambda: ()) -> str | None:
    """What keeps TP ranks from sharing the sampling, with its remedy; `cfg`: SGLang's arguments,
    `models()`: the architectures of its model."""
    if cfg.tp_size < 2:
        return (
            f"needs --tp-size 2 or more, got {cfg.tp_size}: a single rank has nobody to share the "
            "sampling with"
        )
    for rule in RULES:
        value = getattr(cfg, rule.field, None)
        if rule.is_refused(value):
            return f"does not work with {rule.flag} {value}: {rule.reason}; drop one of them"
    if cfg.device not in ("cpu", "cuda"):
        return f"does not run on --device {cfg.device}: drop it"
    if edits := EDITING_MODELS.intersection(models()):
        return f"does not work with {min(edits)}: it edits whole rows of logits; drop it"
    return None


def _decide(server_args: Any, previous: Callable[[Any], None]) -> None:
    """What `auto` means, once SGLang knows its arguments."""
    asked = arguments.sampling_of(server_args)
    if asked is not None:
        cfg = resolving_view(server_args)
        reason = obstacle(cfg, lambda: model_config_of(server_args).hf_config.architectures or ())
        if reason is None and asked == AUTO and cfg.device not in SHARES_BY_ITSELF:
            reason = f"has not been verified on --device {cfg.device} yet; name it to try it"
        if reason is not None and asked == SEQUENCE_PARALLEL:
            error = SidpUsageError(f"--sidp-sampling {asked} {reason}")
            if arguments.is_command_line(server_args):
                arguments.exit_with(error)
            raise error
        if reason is not None and cfg.tp_size > 1:
            logger.info("--sidp-sampling auto is replicated here: sharing it %s", reason)
        arguments.set_sampling(server_args, None if reason else SEQUENCE_PARALLEL)
    previous(server_args)


def install() -> None:
    """Have SGLang's resolution decide; inert for engines that don't ask for it."""
    register_resolution_hook("handle_other_validations")(_decide)

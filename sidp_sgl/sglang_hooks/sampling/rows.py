"""The rows of a batch that one rank samples, as SGLang's sampler takes them."""

import copy
import dataclasses
from typing import Any

# Fields of SGLang's SamplingBatchInfo with an entry per row. The others are true of the whole
# batch, and hold for its rows (flags say which kernels run: for a row the same as in the batch).
ROW_FIELDS = (
    "temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed", "logit_bias", "grammars",
    "acc_additive_penalties", "acc_scaling_penalties", "rids_int", "bootstrap_room_ids_int",
    "return_sampling_masks", "return_sampling_support_logprobs", "sampling_mask_top_ks",
    "watermark_keys", "watermark_context_windows", "watermark_enabled",
    "watermark_candidates_host",
)  # fmt: skip


def slice_info(info: Any, rows: slice) -> Any:
    """Of a SamplingBatchInfo that `copy_for_forward` has made."""
    values = {name: getattr(info, name) for name in ROW_FIELDS}
    parts = {name: value[rows] for name, value in values.items() if value is not None}
    if not any(parts.get("grammars") or ()):
        parts["grammars"] = None
    return dataclasses.replace(info, **parts)


def slice_batch(batch: Any, rows: slice) -> Any:
    """Of a ForwardBatch: what `ModelRunner.sample` reads of it."""
    part = copy.copy(batch)
    part.sampling_info = slice_info(batch.sampling_info, rows)
    part.seq_lens = batch.seq_lens[rows]
    if batch.forward_mode.is_decode():
        part.positions = batch.positions[rows]
    for name in ("top_logprobs_nums", "token_ids_logprobs"):
        if (value := getattr(batch, name)) is not None:
            setattr(part, name, value[rows])
    return part

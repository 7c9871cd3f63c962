"""The rows of a batch, against SGLang's real SamplingBatchInfo."""

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from sidp_sgl.sglang_hooks.sampling.rows import ROW_FIELDS, slice_batch, slice_info

ROWS, VOCAB = 5, 12
# True of the whole batch and of any rows of it; what is left makes a step GATHERED, or is made
# anew from the others.
WHOLE_FIELDS = {
    *("is_all_greedy", "is_any_greedy", "need_top_p_sampling", "need_top_k_sampling"),
    *("need_min_p_sampling", "vocab_size", "device", "npu_top_k_top_p_eligible", "max_top_k"),
}
GATHERED_FIELDS = {
    *("penalizer_orchestrator", "has_custom_logit_processor", "custom_params"),
    *("custom_logit_processor", "sampling_mask_batch_indices", "has_watermark_candidates"),
    "sampling_support_logprobs_capture_indices",
}


def make_info(**values: Any) -> SamplingBatchInfo:
    """Every field that has an entry per row is set."""
    numbers = torch.arange(1, ROWS + 1)
    per_row: dict[str, Any] = {
        "temperatures": numbers.float().view(-1, 1),
        "top_ks": numbers.int(),
        "grammars": [None, "a", None, None, "b"],
        "return_sampling_masks": [False] * ROWS,
        "return_sampling_support_logprobs": [False] * ROWS,
        "sampling_mask_top_ks": list(range(ROWS)),
        "watermark_candidates_host": [False] * ROWS,
        **{
            name: torch.randn(ROWS, VOCAB)
            for name in ("logit_bias", "acc_additive_penalties", "acc_scaling_penalties")
        },
    }
    for name in ROW_FIELDS:
        per_row.setdefault(name, numbers / 10)
    flags = dict.fromkeys(
        ("is_all_greedy", "is_any_greedy", "need_top_p_sampling", "need_top_k_sampling",
         "need_min_p_sampling"), False,
    )  # fmt: skip
    return SamplingBatchInfo(**{**per_row, **flags, "vocab_size": VOCAB, "device": "cpu", **values})


def test_every_field_of_sglang_s_is_known() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingBatchInfo)}
    assert fields == {*ROW_FIELDS, *WHOLE_FIELDS, *GATHERED_FIELDS, "grammar_mask"}


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 5), slice(4, 5), slice(0, 5)], ids=str)
def test_rows_are_those_that_sglang_would_keep(rows: slice) -> None:
    info = make_info()
    kept = copy.deepcopy(info)
    kept.penalizer_orchestrator = SimpleNamespace(filter=lambda _: None)
    indices = list(range(ROWS))[rows]
    kept.filter_batch(indices, torch.tensor(indices))
    part = slice_info(info, rows)
    assert len(part) == len(kept) == len(indices)
    left_to_others = {"grammars", "acc_additive_penalties", "acc_scaling_penalties", "rids_int",
                      "bootstrap_room_ids_int"}  # fmt: skip
    for name in set(ROW_FIELDS) - left_to_others:
        found, expected = getattr(part, name), getattr(kept, name)
        assert torch.equal(found, expected) if torch.is_tensor(found) else found == expected, name
    for name in left_to_others:
        whole = getattr(info, name)[rows]
        found = getattr(part, name)
        if name == "grammars":
            assert found == (whole if any(whole) else None)
        else:
            assert torch.equal(found, whole), name


def test_the_logits_of_rows_are_edited_as_in_the_batch() -> None:
    info = make_info(grammars=None, acc_scaling_penalties=None)  # which would be compiled
    logits = torch.randn(ROWS, VOCAB)
    whole = logits.clone()
    info.apply_logits_bias(whole)
    for rows in (slice(0, 3), slice(3, 5)):
        part = logits[rows].clone()
        slice_info(info, rows).apply_logits_bias(part)
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("is_decode", [True, False])
def test_a_batch_s_rows(is_decode: bool) -> None:
    """A prefill has positions of all its tokens; the sampler takes those of the last ones."""
    batch = SimpleNamespace(
        sampling_info=make_info(),
        seq_lens=torch.arange(ROWS),
        positions=torch.arange(ROWS if is_decode else 40),
        forward_mode=SimpleNamespace(is_decode=lambda: is_decode),
        top_logprobs_nums=[0, 1, 2, 3, 4],
        token_ids_logprobs=None,
        return_logprob=True,
    )
    part = slice_batch(batch, slice(2, 4))
    assert part.seq_lens.tolist() == [2, 3]
    assert part.positions.tolist() == ([2, 3] if is_decode else list(range(40)))
    assert part.top_logprobs_nums == [2, 3] and part.token_ids_logprobs is None
    assert len(part.sampling_info) == 2 and len(batch.sampling_info) == ROWS

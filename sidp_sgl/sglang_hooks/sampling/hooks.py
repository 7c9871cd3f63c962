"""Sequence-parallel sampling: with TP every rank samples its share of the batch, over the whole
vocabulary, where SGLang has every rank gather all logits and sample the whole batch.
"""

import copy
from typing import Any, NamedTuple

import torch
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_parallel

from sidp_sgl.sglang_hooks.required import Hook
from sidp_sgl.sglang_hooks.sampling import exchange
from sidp_sgl.sglang_hooks.sampling.rows import slice_batch
from sidp_sgl.sglang_hooks.sampling.ways import (
    ARGMAX,
    GATHERED,
    SPLIT,
    WAYS,
    Needs,
    leaves_shard,
    share,
    way_of,
)

_LOGITS = "sglang.srt.layers.logits_processor.LogitsProcessor"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"


class Shard(NamedTuple):
    """A rank's part of the logits: [rows, width]."""

    width: int
    vocab_size: int


class SequenceParallelSampling:
    """Of one TP rank. The ranks take the same ways: they run the same batches."""

    def __init__(self) -> None:
        self.steps = dict.fromkeys(WAYS, 0)
        self.shard: Shard | None = None  # what forward passes leave, once one has
        self._leaves_shard = False  # the forward pass that runs
        self._is_split = False  # the sampler that runs has this rank's rows only
        self._is_seeded = False

    def hooks(self) -> list[Hook]:
        return [
            Hook(f"{_LOGITS}._get_logits", self._get_logits, HookType.AROUND),
            Hook(f"{_LOGITS}._copy_logits_to_buffer", self._cast, HookType.AROUND),
            Hook(f"{_RUNNER}.sample", self.sample, HookType.AROUND),
            Hook(f"{_RUNNER}.compute_logprobs_only", self._with_whole_rows, HookType.AROUND),
            Hook(
                "sglang.srt.managers.tp_worker.capture_pre_sample_logits",
                self._capture_beams,
                HookType.AROUND,
            ),
            Hook(
                "sglang.srt.layers.sampler.Sampler._sync_token_ids_across_tp",
                self.sync_token_ids,
                HookType.AROUND,
            ),
            Hook(
                "sglang.srt.managers.scheduler_components.internal_state."
                "SchedulerInternalStateController.get_internal_state",
                self._add_steps,
                HookType.AROUND,
            ),
        ]

    # In the forward pass

    def _get_logits(
        self, original: Any, processor: Any, hidden: Any, lm_head: Any, metadata: Any, *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Leave the shard where the batch goes on to `ModelRunner.sample`."""
        head = getattr(lm_head, "base_layer", lm_head)  # of a LoRA adapter
        width = getattr(head, "num_embeddings_per_partition", None)
        if (
            not processor.do_tensor_parallel_all_gather
            or getattr(head, "tp_size", 1) != get_parallel().tp_size
            or not width
            or width >= processor.vocab_size  # could not be told from whole rows
            or not leaves_shard(
                metadata.forward_mode.name,
                metadata.extend_return_logprob,
                metadata.is_prefill_only,
            )
        ):
            return original(processor, hidden, lm_head, metadata, *args, **kwargs)
        self.shard = Shard(width, processor.vocab_size)
        processor.do_tensor_parallel_all_gather, self._leaves_shard = False, True
        try:
            return original(processor, hidden, lm_head, metadata, *args, **kwargs)
        finally:
            processor.do_tensor_parallel_all_gather, self._leaves_shard = True, False

    def _cast(
        self, original: Any, processor: Any, logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """To fp32, but not here where the exchange can come first: the cast is exact. What SGLang
        does to the logits afterwards it does in fp32."""
        if self._leaves_shard and not processor.final_logit_softcapping:
            return logits
        return original(processor, logits, *args, **kwargs)

    # Between the forward pass and the sampler

    def _is_shard(self, logits: torch.Tensor | None) -> bool:
        return logits is not None and self.shard is not None and (
            logits.shape[-1] == self.shard.width
        )  # fmt: skip

    def _whole_rows(self, shard: torch.Tensor) -> torch.Tensor:
        assert self.shard is not None
        group = get_parallel().tp_group.device_group
        return exchange.gather_rows(shard, self.shard.vocab_size, group)

    def _with_whole_rows(self, original: Any, runner: Any, output: Any, batch: Any) -> Any:
        """What SGLang does with the logits of all rows."""
        shard = output.next_token_logits
        if not self._is_shard(shard):
            return original(runner, output, batch)
        output.next_token_logits = self._whole_rows(shard)
        try:
            return original(runner, output, batch)
        finally:
            output.next_token_logits = shard  # may be a CUDA graph's

    def _capture_beams(self, original: Any, batch: Any, forward_batch: Any, output: Any) -> None:
        """Beam search reads the logits before they are sampled."""
        if (
            batch is not None
            and output is not None
            and self._is_shard(output.next_token_logits)
            and _has_beams(batch, forward_batch)
        ):
            output.next_token_logits = self._whole_rows(output.next_token_logits)
        original(batch, forward_batch, output)

    # The sampler

    def sample(self, original: Any, runner: Any, output: Any, batch: Any) -> torch.Tensor:
        """`ModelRunner.sample`: token ids of all rows."""
        if not self._is_seeded:
            self._is_seeded = True
            seed_apart(get_parallel().tp_rank)
        shard = output.next_token_logits
        way = way_of(_needs(runner, batch)) if self._is_shard(shard) else GATHERED
        self.steps[way] += 1
        if way == GATHERED:
            return self._with_whole_rows(original, runner, output, batch)
        output.auxiliary_device_output = None  # as SGLang does
        if way == ARGMAX:
            assert self.shard is not None
            shard = runner.sampler._preprocess_logits(shard, batch.sampling_info)
            group = get_parallel().tp_group.device_group
            return exchange.greedy(shard, self.shard.vocab_size, group)
        assert way == SPLIT
        return self._sample_share(original, runner, output, batch)

    def _sample_share(self, original: Any, runner: Any, output: Any, batch: Any) -> torch.Tensor:
        assert self.shard is not None
        shard, group = output.next_token_logits, get_parallel().tp_group.device_group
        num_rows = len(shard)
        logits = exchange.exchange_rows(shard, self.shard.vocab_size, group)
        rows = share(num_rows, group.rank(), group.size())
        part = copy.copy(output)
        part.next_token_logits = logits[: rows.stop - rows.start]
        ids = torch.empty(0, dtype=torch.int64, device=shard.device)
        part.next_token_logprobs = torch.empty(0, dtype=torch.float32, device=shard.device)
        if rows.stop > rows.start:
            self._is_split = True
            try:
                ids = original(runner, part, slice_batch(batch, rows))
            finally:
                self._is_split = False
        logprobs = part.next_token_logprobs if batch.return_logprob else None
        ids, logprobs = exchange.gather_results(ids, logprobs, num_rows, group)
        if logprobs is not None:
            output.next_token_logprobs = logprobs
        return ids

    def sync_token_ids(self, original: Any, sampler: Any, ids: torch.Tensor, info: Any) -> None:
        """Where every rank has sampled all rows, each with random numbers of its own: a custom
        logit processor may draw some even in a greedy step."""
        if not self._is_split:
            exchange.share_first_rank_s(ids, get_parallel().tp_group.device_group)

    # Status

    def _add_steps(self, original: Any, *args: Any) -> Any:
        output = original(*args)
        output.internal_state["sidp_sampling"] = dict(self.steps)
        return output


def seed_apart(tp_rank: int) -> None:
    """From here on every TP rank draws random numbers of its own, the first one as before: rows of
    different ranks would draw the same ones. Torch's only: the scheduler's decisions are shared."""
    torch.manual_seed(torch.initial_seed() + tp_rank)


def _has_beams(batch: Any, forward_batch: Any) -> bool:
    return batch.beam_tail is not None or (
        forward_batch.forward_mode.is_extend()
        and any(request.beam_group is not None for request in batch.reqs)
    )


def _needs(runner: Any, batch: Any) -> Needs:
    info = batch.sampling_info
    observer, penalizers = runner.sampling_observer, info.penalizer_orchestrator
    wants_more_logprobs = batch.return_logprob and (
        any(batch.top_logprobs_nums or ())
        or any(ids is not None for ids in batch.token_ids_logprobs or ())
    )
    return Needs(
        all_greedy=info.is_all_greedy,
        logprobs=batch.return_logprob,
        edits_logits=bool(info.grammars)
        or info.logit_bias is not None
        or info.acc_additive_penalties is not None
        or info.acc_scaling_penalties is not None,
        whole_batch=wants_more_logprobs
        or info.has_custom_logit_processor
        or info.sampling_mask_batch_indices is not None
        or info.has_watermark_candidates
        or (penalizers is not None and penalizers.is_required)
        or (observer is not None and observer.is_active(info))
        or runner.ngram_embedding_manager.enabled,
    )

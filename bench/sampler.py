"""SGLang's `ModelRunner.sample` and its sampler without an engine: for bench.sampling and tests."""

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.logprob_processor import OutputLogprobProcessor
from sglang.srt.layers.sampler import Sampler
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import TOP_K_ALL

sample = ModelRunner.sample


class LoneSampler(Sampler):
    """SGLang's, outside of its process groups. `sync`: what stands around its own way of making
    the token ids of TP ranks equal, which `synced` counts and which does nothing here."""

    def __init__(self, sync: Any = None) -> None:
        torch.nn.Module.__init__(self)
        self.rl_on_policy_target = None
        self.enable_deterministic = self.use_log_softmax_logprob = self.use_ascend_backend = False
        self.output_logprob_processor = OutputLogprobProcessor()
        self.synced = 0
        self._sync = sync

    def _sync_token_ids_across_tp(self, ids: torch.Tensor, info: Any) -> None:
        if self._sync is None:
            self._count()
        else:
            self._sync(self._count, self, ids, info)

    def _count(self, *_: Any) -> None:
        self.synced += 1


def make_runner(sync: Any = None, **values: Any) -> Any:
    """What `sample` takes for a ModelRunner."""
    ngrams = SimpleNamespace(enabled=False, update_after_decode=lambda **_: None)
    defaults = {
        "sampling_observer": None,
        "watermark_state": None,
        "sampler": LoneSampler(sync),
        "ngram_embedding_manager": ngrams,
    }
    runner = SimpleNamespace(**{**defaults, **values})
    runner._preprocess_logits = lambda *args: ModelRunner._preprocess_logits(runner, *args)
    return runner


def make_batch(
    num_rows: int, vocab_size: int, *, greedy: bool, logprobs: bool = False, device: str = "cpu",
    top_logprobs_nums: list[int] | None = None, **info: Any,
) -> Any:  # fmt: skip
    """What `sample` takes for a ForwardBatch: a decode step. `info`: of its SamplingBatchInfo."""
    defaults = {
        "temperatures": torch.full((num_rows, 1), 0.7, device=device),
        "top_ps": torch.ones(num_rows, device=device),
        "top_ks": torch.full(
            (num_rows,), 1 if greedy else TOP_K_ALL, dtype=torch.int32, device=device
        ),
        "min_ps": torch.zeros(num_rows, device=device),
        "need_top_p_sampling": False,
        "need_top_k_sampling": False,
        "need_min_p_sampling": False,
    }
    return SimpleNamespace(
        sampling_info=SamplingBatchInfo(
            **{**defaults, **info},
            is_all_greedy=greedy,
            is_any_greedy=greedy,
            vocab_size=vocab_size,
            device=device,
        ),
        return_logprob=logprobs,
        top_logprobs_nums=top_logprobs_nums or [0] * num_rows,
        token_ids_logprobs=[None] * num_rows,
        positions=torch.arange(num_rows, device=device),
        seq_lens=torch.arange(num_rows, device=device),
        forward_mode=ForwardMode.DECODE,
    )


def output_of(logits: torch.Tensor) -> LogitsProcessorOutput:
    return LogitsProcessorOutput(next_token_logits=logits)

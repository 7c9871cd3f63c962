"""Ranks that sample together, with SGLang's own `ModelRunner.sample` and sampler between the hooks:
what comes out is what one process makes of the whole rows, to the bit."""

import pkgutil
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from bench import sampler
from bench.sampler import make_runner, output_of
from sidp_sgl.sglang_hooks.sampling import hooks as hooks_module
from sidp_sgl.sglang_hooks.sampling.hooks import SequenceParallelSampling, seed_apart
from tests.support.groups import in_ranks

VOCAB, SIZE = 70, 2
WIDTH = 64  # of a shard: padded to 128
_here = threading.local()


@pytest.fixture(autouse=True)
def parallel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each thread is the rank of its group."""
    monkeypatch.setattr(hooks_module, "get_parallel", lambda: _here.parallel)
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


class Grammar:
    """Allows one token only."""

    finished = False

    def __init__(self, token: int) -> None:
        self.token = token

    def is_terminated(self) -> bool:
        return False

    def allocate_vocab_mask(self, vocab_size: int, batch_size: int, device: str) -> torch.Tensor:
        return torch.zeros(batch_size, vocab_size)

    def fill_vocab_mask_batched(self, entries: list, mask: torch.Tensor) -> None:
        for row, grammar in entries:
            mask[row] = -torch.inf
            mask[row, grammar.token] = 0

    def move_vocab_mask(self, mask: torch.Tensor, device: str) -> torch.Tensor:
        return mask

    def apply_vocab_mask(self, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
        logits.add_(vocab_mask)


def make_batch(num_rows: int, **values: Any) -> Any:
    return sampler.make_batch(num_rows, VOCAB, **values)


def make_logits(num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, VOCAB, generator=generator).bfloat16()


def sample_together(logits: torch.Tensor, make: Any, size: int = SIZE) -> list[tuple]:
    """(ids, output, sampling, sampler) of every rank."""

    def rank(group: torch.distributed.ProcessGroup) -> tuple:
        number = group.rank()
        _here.parallel = SimpleNamespace(
            tp_rank=number, tp_size=size, tp_group=SimpleNamespace(device_group=group)
        )
        sampling = SequenceParallelSampling()
        runner = make_runner(sampling.sync_token_ids)
        padded = torch.nn.functional.pad(logits, (0, WIDTH * size - VOCAB), value=torch.inf)
        leave_shard(
            sampling, padded[:, number * WIDTH : (number + 1) * WIDTH], head={"tp_size": size}
        )
        shard = padded[:, number * WIDTH : (number + 1) * WIDTH].clone()
        output = output_of(shard)
        ids = sampling.sample(sampler.sample, runner, output, make())
        assert output.next_token_logits is shard and torch.equal(
            shard, padded[:, number * WIDTH : (number + 1) * WIDTH]
        ), "it may be a CUDA graph's: neither replaced nor written to"
        return ids, output, sampling, runner.sampler

    return in_ranks(size, rank)


def sample_alone(logits: torch.Tensor, batch: Any) -> tuple[torch.Tensor, LogitsProcessorOutput]:
    output = output_of(logits.float())
    return sampler.sample(make_runner(), output, batch), output


def leave_shard(sampling: SequenceParallelSampling, shard: torch.Tensor, **metadata: Any) -> Any:
    """A forward pass; what SGLang's processor was like meanwhile, and what came out of the cast."""
    processor = SimpleNamespace(
        do_tensor_parallel_all_gather=True, vocab_size=VOCAB, final_logit_softcapping=None
    )
    head = SimpleNamespace(num_embeddings_per_partition=shard.shape[1], tp_size=SIZE)
    seen: dict[str, Any] = {}

    def sglang_s(processor: Any, *_: Any) -> torch.Tensor:
        seen["gathers"] = processor.do_tensor_parallel_all_gather
        seen["dtype"] = sampling._cast(lambda _, x: x.float(), processor, shard).dtype
        return shard

    values = {"extend_return_logprob": False, "is_prefill_only": False, **metadata}
    head_values = values.pop("head", {})
    for name, value in values.pop("processor", {}).items():
        setattr(processor, name, value)
    metadata = SimpleNamespace(**{"forward_mode": ForwardMode.DECODE, **values})
    vars(head).update(head_values)
    sampling._get_logits(sglang_s, processor, None, head, metadata)
    expected = values.get("processor", {}).get("do_tensor_parallel_all_gather", True)
    assert processor.do_tensor_parallel_all_gather == expected
    return seen


def test_a_forward_pass_leaves_its_shard_in_its_own_type() -> None:
    _here.parallel = SimpleNamespace(tp_size=SIZE)
    shard = torch.zeros(3, WIDTH, dtype=torch.bfloat16)
    left = {"gathers": False, "dtype": torch.bfloat16}
    assert leave_shard(SequenceParallelSampling(), shard) == left
    capped = leave_shard(
        SequenceParallelSampling(), shard, processor={"final_logit_softcapping": 30.0}
    )
    assert capped == {"gathers": False, "dtype": torch.float32}, "capped in fp32, as always"


@pytest.mark.parametrize(
    "changes",
    [
        {"extend_return_logprob": True, "forward_mode": ForwardMode.EXTEND},
        {"is_prefill_only": True, "forward_mode": ForwardMode.EXTEND},
        {"forward_mode": ForwardMode.TARGET_VERIFY},
        {"head": {"tp_size": 1}},
        {"head": {"num_embeddings_per_partition": VOCAB}},
        {"processor": {"vocab_size": WIDTH}},
    ],
    ids=str,
)
def test_a_forward_pass_whose_rows_are_read_gathers_them(changes: dict[str, Any]) -> None:
    _here.parallel = SimpleNamespace(tp_size=SIZE)
    sampling = SequenceParallelSampling()
    shard = torch.zeros(3, WIDTH, dtype=torch.bfloat16)
    assert leave_shard(sampling, shard, **changes) == {"gathers": True, "dtype": torch.float32}
    assert not sampling._is_shard(shard)


EXTRAS = {
    "argmax": {"greedy": True},
    "logprobs": {"greedy": True, "logprobs": True},
    "bias": {"greedy": True, "logit_bias": True},
    "penalty": {"greedy": True, "logprobs": True, "acc_additive_penalties": True},
    "grammar": {"greedy": True, "logprobs": True, "grammars": True},
    "top": {"greedy": True, "logprobs": True, "top_logprobs_nums": True},
}
WAYS = {"argmax": "argmax", "top": "gathered"}


@pytest.mark.parametrize(("num_rows", "size"), [(1, 2), (4, 2), (7, 2), (2, 3), (5, 4)])
@pytest.mark.parametrize("extra", EXTRAS)
def test_greedy_rows_are_those_of_one_process(extra: str, num_rows: int, size: int) -> None:
    """With three ranks and more, some have nothing but padding, and some no rows."""
    logits, bias = make_logits(num_rows), 5 * make_logits(num_rows).flip(1).float()

    def make() -> Any:
        made = {
            "logit_bias": bias,
            "acc_additive_penalties": bias,
            "grammars": [Grammar(9), *[None] * (num_rows - 1)],  # the last rank may have none
            "top_logprobs_nums": [3] * num_rows,
        }
        return make_batch(num_rows, **{k: made.get(k, v) for k, v in EXTRAS[extra].items()})

    expected, reference = sample_alone(logits, make())
    for ids, output, sampling, _ in sample_together(logits, make, size):
        assert torch.equal(ids, expected)
        assert sampling.steps == {
            way: int(way == WAYS.get(extra, "split")) for way in sampling.steps
        }
        if EXTRAS[extra].get("logprobs"):
            assert torch.equal(output.next_token_logprobs, reference.next_token_logprobs)
        else:
            assert output.next_token_logprobs is None
        if extra == "top":
            for name in ("next_token_top_logprobs_val", "next_token_top_logprobs_idx"):
                found, wanted = getattr(output, name), getattr(reference, name)
                assert [x.tolist() for x in found] == [x.tolist() for x in wanted]


@pytest.mark.parametrize("way", ["split", "gathered"])
def test_sampled_rows_are_the_same_on_all_ranks_and_have_their_logprobs(way: str) -> None:
    logits, num_rows = make_logits(7), 7
    nums = [2] * num_rows if way == "gathered" else [0] * num_rows

    def make() -> Any:
        return make_batch(num_rows, greedy=False, logprobs=True, top_logprobs_nums=nums)

    (ids, output, sampling, own_sampler), (others, other_output, *_) = sample_together(logits, make)
    assert torch.equal(ids, others)
    assert sampling.steps[way] == 1
    assert own_sampler.synced == 0, "SGLang's own would mix the ranks' rows"
    expected = torch.log_softmax(logits.float() / 0.7, dim=-1).gather(1, ids.long().view(-1, 1))
    torch.testing.assert_close(output.next_token_logprobs, expected.view(-1))
    if way == "split":
        assert torch.equal(output.next_token_logprobs, other_output.next_token_logprobs)


def test_of_rows_that_every_rank_has_sampled_the_first_one_s_count() -> None:
    """Also in greedy steps: a custom logit processor may have drawn random numbers."""
    info = make_batch(3, greedy=True).sampling_info

    def rank(group: torch.distributed.ProcessGroup) -> torch.Tensor:
        _here.parallel = SimpleNamespace(tp_group=SimpleNamespace(device_group=group))
        ids = torch.full((3,), group.rank())
        SequenceParallelSampling().sync_token_ids(None, None, ids, info)
        return ids

    assert not any(ids.any() for ids in in_ranks(3, rank))


class Observer:
    def is_active(self, _: Any) -> bool:
        return True

    def before_grammar(self, *_: Any) -> None:
        return None


@pytest.mark.parametrize(
    "values",
    [
        {"custom_logit_processor": {}, "has_custom_logit_processor": True},
        {"sampling_mask_batch_indices": torch.tensor([0])},
        {"has_watermark_candidates": True},
        {"penalizer_orchestrator": SimpleNamespace(is_required=True, apply=lambda _: None)},
    ],
    ids=lambda values: next(reversed(values)),
)
def test_what_sglang_does_over_the_whole_batch_it_gets_the_whole_batch_for(
    values: dict[str, Any],
) -> None:
    assert hooks_module._needs(make_runner(), make_batch(3, greedy=True, **values)).whole_batch
    assert not hooks_module._needs(make_runner(), make_batch(3, greedy=True)).whole_batch
    observed = make_runner(sampling_observer=Observer())
    assert hooks_module._needs(observed, make_batch(3, greedy=True)).whole_batch
    ngrams = make_runner(ngram_embedding_manager=SimpleNamespace(enabled=True))
    assert hooks_module._needs(ngrams, make_batch(3, greedy=True)).whole_batch


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.EXTEND])
def test_beam_search_reads_whole_rows(mode: ForwardMode) -> None:
    logits, seen = make_logits(3), []
    beams = SimpleNamespace(
        beam_tail=object() if mode.is_decode() else None,
        reqs=[SimpleNamespace(beam_group=object())],
    )

    def rank(group: torch.distributed.ProcessGroup) -> None:
        _here.parallel = SimpleNamespace(tp_size=SIZE, tp_group=SimpleNamespace(device_group=group))
        sampling = SequenceParallelSampling()
        padded = torch.nn.functional.pad(logits, (0, WIDTH * SIZE - VOCAB))
        shard = padded[:, group.rank() * WIDTH :][:, :WIDTH]
        leave_shard(sampling, shard)
        for batch in (beams, SimpleNamespace(beam_tail=None, reqs=[])):
            output = output_of(shard)
            sampling._capture_beams(
                lambda *_, o=output: seen.append(o.next_token_logits), batch,
                SimpleNamespace(forward_mode=mode), output,
            )  # fmt: skip

    in_ranks(SIZE, rank)
    whole = [found for found in seen if found.shape[1] == VOCAB]
    assert len(whole) == SIZE and all(torch.equal(found, logits.float()) for found in whole)
    assert len(seen) == 2 * SIZE


def draws(tp_rank: int, probabilities: torch.Tensor, steps: int, *, apart: bool) -> torch.Tensor:
    """[steps, rows of a rank]: what a rank's process draws after SGLang has seeded it."""
    torch.manual_seed(42)
    if apart:
        seed_apart(tp_rank)
    return torch.stack([torch.multinomial(probabilities, 1).view(-1) for _ in range(steps)])


def test_rows_of_two_ranks_draw_independently() -> None:
    """Rows i and i + B/t: equal with the probability that two draws are, and every pair of tokens
    as often as it should be."""
    p, rows, steps = torch.tensor([0.5, 0.25, 0.15, 0.1]), 8, 2000
    probabilities = p.repeat(rows, 1)
    same = [draws(rank, probabilities, steps, apart=False) for rank in range(2)]
    assert torch.equal(*same), "this is what seeds apart are for"
    first, second = (draws(rank, probabilities, steps, apart=True) for rank in range(2))
    assert torch.equal(first, same[0]), "the first rank's are SGLang's"
    num = rows * steps
    pairs = torch.bincount((4 * first + second).flatten(), minlength=16)
    expected = num * (p.view(-1, 1) * p).flatten()
    assert float(((pairs - expected) ** 2 / expected).sum()) < 37.7  # χ² of 15: p = 0.001
    for drawn in (first, second):
        counts = torch.bincount(drawn.flatten(), minlength=4)
        assert float(((counts - num * p) ** 2 / (num * p)).sum()) < 16.3  # χ² of 3: p = 0.001


def test_the_hooks_find_their_targets() -> None:
    for hook in SequenceParallelSampling().hooks():
        assert callable(pkgutil.resolve_name(hook.target)), hook.target


def test_server_info_has_the_steps() -> None:
    sampling = SequenceParallelSampling()
    sampling.steps["split"] += 3
    output = SimpleNamespace(internal_state={"sidp": {}})
    assert sampling._add_steps(lambda *_: output, None, None) is output
    assert output.internal_state == {
        "sidp": {},
        "sidp_sampling": {"argmax": 0, "split": 3, "gathered": 0},
    }

"""What ranks exchange, over real collectives: whole rows as a gather gives them, to the bit; the
most probable tokens, of equal ones the lowest; padding that nobody sees."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidp_sgl.sglang_hooks.sampling import exchange
from sidp_sgl.sglang_hooks.sampling.ways import share
from tests.support.groups import in_ranks

SHAPES = st.tuples(st.integers(1, 9), st.integers(2, 70), st.integers(2, 4), st.integers(0, 2**31))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def make_logits(num_rows: int, vocab_size: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator).to(dtype)


def shard_of(logits: torch.Tensor, rank: int, size: int, pad_to: int = 8) -> torch.Tensor:
    """A rank's part, as a vocab-parallel LM head gives it; padding wins where it is looked at."""
    width = -(-logits.shape[1] // (pad_to * size)) * pad_to
    padded = logits.new_full((len(logits), width * size), torch.inf)
    padded[:, : logits.shape[1]] = logits
    return padded[:, rank * width : (rank + 1) * width]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=10)
@given(shape=SHAPES)
def test_rows_are_those_of_a_gather(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    num_rows, vocab_size, size, seed = shape
    logits = make_logits(num_rows, vocab_size, seed, dtype)

    def rank(group: torch.distributed.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
        shard = shard_of(logits, group.rank(), size)
        return (
            exchange.gather_rows(shard, vocab_size, group),
            exchange.exchange_rows(shard, vocab_size, group),
        )

    for number, (every, mine) in enumerate(in_ranks(size, rank)):
        rows = share(num_rows, number, size)
        for found, expected in ((every, logits), (mine[: rows.stop - rows.start], logits[rows])):
            assert found.dtype == torch.float32 and found.is_contiguous()
            assert torch.equal(found, expected.float())
        assert not mine[rows.stop - rows.start :].any(), "rows beyond the batch"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=10)
@given(shape=SHAPES, levels=st.integers(1, 4))
def test_greedy_takes_the_lowest_of_the_most_probable(
    dtype: torch.dtype, shape: tuple[int, int, int, int], levels: int
) -> None:
    num_rows, vocab_size, size, seed = shape
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (num_rows, vocab_size), generator=generator).to(dtype)  # ties

    def rank(group: torch.distributed.ProcessGroup) -> torch.Tensor:
        return exchange.greedy(shard_of(logits, group.rank(), size), vocab_size, group)

    for ids in in_ranks(size, rank):
        assert ids.dtype == torch.int64
        assert torch.equal(ids, logits.float().argmax(dim=-1))


def test_greedy_of_rows_that_are_no_numbers_is_argmax_s() -> None:
    logits = torch.zeros(3, 40)
    logits[0, [33, 7]] = torch.nan
    logits[1, 35] = torch.nan
    logits[2] = -torch.inf

    def rank(group: torch.distributed.ProcessGroup) -> torch.Tensor:
        return exchange.greedy(shard_of(logits, group.rank(), 4), 40, group)

    for ids in in_ranks(4, rank):
        assert torch.equal(ids, logits.argmax(dim=-1))


@given(st.integers(1, 9), st.integers(2, 4))
@settings(max_examples=10)
def test_results_come_in_the_order_of_the_rows(num_rows: int, size: int) -> None:
    ids = torch.arange(num_rows) * 100_003 + 2**31
    logprobs = torch.linspace(-30, 0, num_rows)

    def rank(group: torch.distributed.ProcessGroup) -> tuple:
        rows = share(num_rows, group.rank(), size)
        first = torch.full((4,), 7 * group.rank())
        exchange.share_first_rank_s(first, group)
        return (
            *exchange.gather_results(ids[rows], logprobs[rows], num_rows, group),
            *exchange.gather_results(ids[rows].int(), None, num_rows, group),
            first,
        )

    for found, found_logprobs, small, none, first in in_ranks(size, rank):
        assert torch.equal(found, ids) and torch.equal(found_logprobs, logprobs)
        assert torch.equal(small, ids.int().long()) and none is None
        assert not first.any()

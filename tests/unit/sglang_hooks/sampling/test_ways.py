"""Which way a step is sampled, and whose rows are whose."""

from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.sglang_hooks.sampling.ways import (
    ARGMAX,
    GATHERED,
    Needs,
    leaves_shard,
    rows_per_rank,
    share,
    way_of,
)

NEEDS = st.builds(Needs, st.booleans(), st.booleans(), st.booleans(), st.booleans())


@given(NEEDS)
def test_what_needs_the_whole_batch_gets_it_and_nothing_else_does(needs: Needs) -> None:
    assert (way_of(needs) == GATHERED) == needs.whole_batch


@given(NEEDS)
def test_maxima_are_enough_only_where_nothing_but_the_token_is_wanted(needs: Needs) -> None:
    plain = Needs(all_greedy=True, logprobs=False, edits_logits=False, whole_batch=False)
    assert (way_of(needs) == ARGMAX) == (needs == plain)


@given(st.integers(1, 200), st.integers(1, 16))
def test_every_row_is_one_rank_s(num_rows: int, tp_size: int) -> None:
    shares = [share(num_rows, rank, tp_size) for rank in range(tp_size)]
    assert [row for part in shares for row in range(part.start, part.stop)] == list(range(num_rows))
    assert all(part.stop - part.start <= rows_per_rank(num_rows, tp_size) for part in shares)
    assert rows_per_rank(num_rows, tp_size) * tp_size - num_rows < tp_size, "the least padding"


def test_passes_that_read_logits_otherwise_have_them_whole() -> None:
    assert all(leaves_shard(mode, False, False) for mode in ("DECODE", "EXTEND", "MIXED"))
    assert not leaves_shard("EXTEND", input_logprobs=True, prefill_only=False)
    assert not leaves_shard("EXTEND", input_logprobs=False, prefill_only=True)
    for mode in ("TARGET_VERIFY", "DRAFT_EXTEND_V2", "DLLM_EXTEND", "IDLE", "SPLIT_PREFILL"):
        assert not leaves_shard(mode, False, False), mode


def test_the_modes_are_sglang_s() -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    modes = {mode.name for mode in ForwardMode if leaves_shard(mode.name, False, False)}
    assert modes == {"DECODE", "EXTEND", "MIXED"}

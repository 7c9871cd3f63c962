"""Owners of blocks and what follows from them, for any number of blocks, sizes and ranks."""

from collections import Counter
from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.weightpool.placement import Placement, Stripe

NUM_BLOCKS = st.integers(0, 100)
NUM_RANKS = st.integers(2, 16)
KINDS = st.sampled_from(["interleaved", "contiguous"])
SIZES = st.lists(st.integers(1, 10**9), max_size=40)


def owners(placement: Placement) -> list[int]:
    return [placement.owners(block)[0] for block in range(len(placement.blocks))]


@given(NUM_BLOCKS, NUM_RANKS, KINDS)
def test_every_block_has_one_owner_and_shares_differ_by_one(
    num_blocks: int, num_ranks: int, kind: str
) -> None:
    result = owners(Placement.of([7] * num_blocks, num_ranks, kind=kind))
    assert len(result) == num_blocks
    assert all(0 <= owner < num_ranks for owner in result)
    shares = Counter(result)
    sizes = [shares[rank] for rank in range(num_ranks)]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True), "the first ranks own the odd blocks"


@given(NUM_BLOCKS, NUM_RANKS)
def test_contiguous_gives_each_rank_one_run(num_blocks: int, num_ranks: int) -> None:
    placement = Placement.of([7] * num_blocks, num_ranks, kind="contiguous")
    runs = [rank for rank, _ in groupby(owners(placement))]
    assert runs == list(range(min(num_blocks, num_ranks)))


@given(NUM_BLOCKS, NUM_RANKS)
def test_interleaved_is_block_mod_ranks_where_blocks_are_alike(
    num_blocks: int, num_ranks: int
) -> None:
    result = owners(Placement.of([7] * num_blocks, num_ranks))
    assert result == [block % num_ranks for block in range(num_blocks)]


@given(SIZES, NUM_RANKS)
def test_interleaved_balances_bytes(sizes: list[int], num_ranks: int) -> None:
    placement = Placement.of(sizes, num_ranks)
    owned = [placement.owned_bytes(rank) for rank in range(num_ranks)]
    assert max(owned) - min(owned) <= max(sizes, default=0)


@given(SIZES, NUM_RANKS, KINDS)
def test_a_model_can_be_placed_while_it_is_built(
    sizes: list[int], num_ranks: int, kind: str
) -> None:
    placement = whole = Placement.of(sizes, num_ranks, kind=kind)
    placement = replace(placement, blocks=())
    for layer, size in enumerate(sizes):
        placement = placement.with_block(size, layer)
        assert placement.blocks == whole.blocks[: len(placement.blocks)]
    assert placement == whole


@given(SIZES, NUM_RANKS, KINDS, st.integers(1, 50))
def test_bytes_add_up(sizes: list[int], num_ranks: int, kind: str, num_slots: int) -> None:
    placement = Placement.of(sizes, num_ranks, num_slots, kind)
    ranks = range(num_ranks)
    assert sum(map(placement.owned_bytes, ranks)) == placement.pooled_bytes == sum(sizes)
    for rank in ranks:
        fetched = placement.fetched(rank)
        assert sorted([*fetched, *placement.owned(rank)]) == list(range(len(sizes)))
        assert placement.slots(rank) == min(num_slots, len(fetched))
        assert placement.keeps_all(rank) == (placement.slots(rank) == len(fetched))
        assert placement.slot_bytes(rank) == max((sizes[n] for n in fetched), default=0)
        held = placement.owned_bytes(rank) + placement.cache_bytes(rank)
        assert placement.freed_bytes(rank) == sum(sizes) - held
        asked = placement.asked(rank)
        assert rank not in asked
        assert asked == sorted({placement.owners(block)[0] for block in fetched})
    assert placement.most_slots == max(len(placement.fetched(rank)) for rank in ranks)


def test_stripes_of_a_block_cover_it_and_have_an_owner_each() -> None:
    placement = Placement.of([100, 60], 3)
    striped = placement.with_stripes(0, [Stripe(1, 0, 40), Stripe(2, 40, 60)])
    assert striped.owners(0) == (1, 2) and striped.owners(1) == placement.owners(1)
    assert not any(striped.owns(rank, 0) for rank in range(3))
    assert [striped.owned_bytes(rank) for rank in range(3)] == [0, 100, 60]
    assert striped.fetched(0) == [0, 1] and striped.fetched(1) == [0]
    assert striped.asked(2) == [1]
    with pytest.raises(ValueError, match="gap at byte 40"):
        placement.with_stripes(0, [Stripe(1, 0, 40), Stripe(2, 50, 50)])


def test_unknown_placement_is_named() -> None:
    with pytest.raises(ValueError, match="'scattered'"):
        Placement.of([1], 2, kind="scattered")

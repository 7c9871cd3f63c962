"""Owners of layers, for any number of layers and ranks."""

from collections import Counter
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.weightpool.placement import owner_of, owners

NUM_LAYERS = st.integers(0, 200)
NUM_RANKS = st.integers(2, 32)
PLACEMENTS = ("interleaved", "contiguous")


@given(NUM_LAYERS, NUM_RANKS, st.sampled_from(PLACEMENTS))
def test_every_layer_has_one_owner_and_shares_differ_by_one(
    num_layers: int, num_ranks: int, placement: str
) -> None:
    result = owners(num_layers, num_ranks, placement)
    assert len(result) == num_layers
    assert all(0 <= owner < num_ranks for owner in result)
    assert result == [owner_of(n, num_layers, num_ranks, placement) for n in range(num_layers)]
    shares = Counter(result)
    sizes = [shares[rank] for rank in range(num_ranks)]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True), "the first ranks own the odd layers"


@given(NUM_LAYERS, NUM_RANKS)
def test_contiguous_gives_each_rank_one_run(num_layers: int, num_ranks: int) -> None:
    runs = [rank for rank, _ in groupby(owners(num_layers, num_ranks, "contiguous"))]
    assert runs == list(range(min(num_layers, num_ranks)))


@given(NUM_LAYERS, NUM_RANKS)
def test_interleaved_is_layer_mod_ranks(num_layers: int, num_ranks: int) -> None:
    result = owners(num_layers, num_ranks, "interleaved")
    assert result == [layer % num_ranks for layer in range(num_layers)]


def test_unknown_placement_is_named() -> None:
    with pytest.raises(ValueError, match="'scattered'"):
        owner_of(0, 4, 2, "scattered")

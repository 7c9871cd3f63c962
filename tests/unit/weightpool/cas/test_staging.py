"""Staging: rows of their own for every requester, in memory that is small beside a block."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.weightpool.alignment import ALIGNMENT
from sidp_sgl.weightpool.cas.staging import LEAST_ROWS, MOST_ROWS, make_staging


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_every_rank_has_rows_of_its_own_at_every_owner(num_ranks: int) -> None:
    for owner in range(num_ranks):
        staging = make_staging([(100, 36)], num_ranks)
        offsets = [staging.offset(owner, rank) for rank in range(num_ranks) if rank != owner]
        step = staging.rows_per_rank * staging.row_bytes
        assert offsets == list(range(0, staging.inbox_bytes, step))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), min_size=1),
    num_ranks=st.integers(2, 8),
    block_bytes=st.integers(0, 1 << 30),
)
def test_rows_beyond_the_least_take_an_eighth_of_a_block_at_most(
    sizes: list[tuple[int, int]], num_ranks: int, block_bytes: int
) -> None:
    staging = make_staging(sizes, num_ranks, block_bytes=block_bytes)
    rows = staging.rows_per_rank
    assert LEAST_ROWS <= rows <= MOST_ROWS and rows.bit_count() == 1
    if rows > LEAST_ROWS:
        assert staging.num_bytes <= block_bytes / 8 + ALIGNMENT
    if rows < MOST_ROWS:
        assert 2 * staging.num_bytes > block_bytes / 8 - 2 * ALIGNMENT


def test_a_small_model_has_the_least_and_a_large_one_the_most() -> None:
    row = 2 * 128
    assert make_staging([(row, row)], 4, block_bytes=3 * 128 * 512 * 2).rows_per_rank == LEAST_ROWS
    row = 2 * 8192
    assert make_staging([(row, row)], 4, block_bytes=3 * 8192 * 14336 * 2).rows_per_rank == 512

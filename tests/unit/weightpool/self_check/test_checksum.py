"""Whatever is changed in a stripe changes its checksum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.weightpool.self_check import checksum as module
from sidp_sgl.weightpool.self_check.checksum import checksum

SIZES = [1, 7, 8, 256, 8 * 1024, 8 * 1024 + 8, 3 * 8 * 1024 + 261]


def random_bytes(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", SIZES)
@given(data=st.data())
def test_one_wrong_byte(size: int, data: st.DataObject) -> None:
    memory = random_bytes(size)
    before = int(checksum(memory))
    assert int(checksum(memory.clone())) == before
    place = data.draw(st.integers(0, size - 1))
    memory[place] ^= data.draw(st.integers(1, 255))
    assert int(checksum(memory)) != before


@given(st.integers(0, 3 * 8 * 1024), st.integers(1, 8 * 1024))
def test_a_piece_of_another_block_or_of_poison(start: int, length: int) -> None:
    memory = random_bytes(SIZES[-1])
    for other in (random_bytes(SIZES[-1], seed=1), torch.full((SIZES[-1],), 0xA5).byte()):
        torn = memory.clone()
        torn[start : start + length] = other[start : start + length]
        assert torch.equal(torn, memory) or int(checksum(torn)) != int(checksum(memory))


@given(st.permutations(range(12)))
def test_pieces_in_another_order(order: list[int]) -> None:
    """Rows of the sum, and words within one."""
    for piece in (8, 8 * 1024):
        memory = random_bytes(12 * piece).view(12, piece)
        swapped = memory[torch.tensor(order)]
        is_same = torch.equal(memory, swapped)
        assert (int(checksum(swapped.flatten())) == int(checksum(memory.flatten()))) == is_same


def test_the_place_in_memory_does_not_matter() -> None:
    memory = random_bytes(40_000)
    piece = memory[3 : 3 + 20_001]
    assert int(checksum(piece)) == int(checksum(piece.clone()))


def test_it_is_what_it_says() -> None:
    """Against whole numbers in Python."""
    memory = random_bytes(2 * 8 * 1024 + 24)
    words = memory.view(torch.int64).tolist()

    def odd(position: int) -> int:
        return position * module._MIX | 1

    total = 0
    for index, word in enumerate(words):
        row, column = divmod(index, module._WIDTH)
        weight = odd(row) + 2 * odd(column) if row < 2 else odd(module._TAIL + column)
        total += word * weight
    assert (int(checksum(memory)) - total) % 2**64 == 0

"""How tensors lie in a block: aligned, apart, equal to what was put in, also transposed."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.weightpool.alignment import ALIGNMENT
from sidp_sgl.weightpool.layout import BlockLayout, make_layout

DTYPES = [torch.bfloat16, torch.float32, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.bool]


@st.composite
def dense_tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of random bytes without gaps, its dimensions in any order in memory."""
    shape = draw(st.lists(st.integers(1, 7), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    numel = torch.Size(shape).numel()
    num_bytes = numel * dtype.itemsize
    data = torch.randint(0, 2, (num_bytes,), dtype=torch.uint8, generator=generator)
    tensor = data.view(dtype).view(shape)
    return tensor.permute(draw(st.permutations(range(len(shape)))))


BLOCKS = st.lists(dense_tensors(), max_size=5).map(
    lambda tensors: [(f"unit.{index}", tensor) for index, tensor in enumerate(tensors)]
)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


@given(BLOCKS)
def test_tensors_are_aligned_and_do_not_overlap(block: list[tuple[str, torch.Tensor]]) -> None:
    layout = make_layout(block)
    end = 0
    for spec, (name, tensor) in zip(layout.tensors, block, strict=True):
        assert spec.name == name
        assert spec.offset % ALIGNMENT == 0
        assert spec.offset >= end
        assert spec.offset - end < ALIGNMENT, "no more padding than alignment asks for"
        assert spec.num_bytes == tensor.numel() * tensor.element_size()
        end = spec.offset + spec.num_bytes
    assert layout.num_bytes % ALIGNMENT == 0
    assert end <= layout.num_bytes < end + ALIGNMENT


@given(BLOCKS)
def test_views_hold_what_was_put_in(block: list[tuple[str, torch.Tensor]]) -> None:
    layout = make_layout(block)
    memory = torch.full((layout.num_bytes,), 0xA5, dtype=torch.uint8)
    views = layout.views(memory)
    for name, tensor in block:
        views[name].copy_(tensor)
    for name, tensor in block:
        view = views[name]
        assert (view.shape, view.stride(), view.dtype) == (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        assert same_bytes(view, tensor)
    # A copy of the bytes is a copy of the block: what one fetch does.
    fetched = layout.views(memory.clone())
    assert all(same_bytes(fetched[name], tensor) for name, tensor in block)


@given(BLOCKS)
def test_round_trip_over_json(block: list[tuple[str, torch.Tensor]]) -> None:
    layout = make_layout(block)
    assert BlockLayout.from_dict(json.loads(json.dumps(layout.as_dict()))) == layout


@given(dense_tensors())
def test_meta_tensors_have_the_same_layout(tensor: torch.Tensor) -> None:
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    assert make_layout([("w", meta)]) == make_layout([("w", tensor)])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 6)[:, :3],
        torch.zeros(1).expand(5),
        torch.zeros(6)[::2],
        torch.zeros(0, 3),
        # As long as a dense tensor, and yet with gaps and overlaps.
        torch.zeros(6).as_strided((2, 3), (5, 0)),
    ],
    ids=["narrowed", "expanded", "strided", "empty", "gaps and overlaps"],
)
def test_what_a_block_cannot_hold_is_refused_by_name(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"mlp\.weight"):
        make_layout([("mlp.weight", tensor)])

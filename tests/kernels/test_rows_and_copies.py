"""Rows packed and scattered, blocks copied: exactly what was asked for, and nothing beside it."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.kernels import copies, rows

DTYPES = [torch.bfloat16, torch.float32, torch.uint8]


def random_rows(num_rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 250, (num_rows, width), generator=generator).to(dtype)


@st.composite
def packings(draw: st.DrawFn) -> tuple[torch.dtype, int, list[int], int]:
    """Dtype, width, rows to be packed, and the bucket that they are packed into."""
    index = draw(st.lists(st.integers(0, 19), min_size=0, max_size=8))
    width = 4 * draw(st.sampled_from([1, 3, 300, 1025]))
    return draw(st.sampled_from(DTYPES)), width, index, draw(st.integers(max(len(index), 1), 9))


def test_packed_rows_are_those_asked_for(device: torch.device) -> None:
    @given(packings())
    def check(packing: tuple[torch.dtype, int, list[int], int]) -> None:
        dtype, width, index, bucket = packing
        source = random_rows(20, width, dtype, seed=1)
        out, padding = random_rows(bucket, width, dtype, seed=2), [99] * (bucket - len(index))
        places = torch.tensor(index + padding, dtype=torch.int32)  # padding is never read
        count = torch.tensor([len(index)], dtype=torch.int32)
        expected = out.clone()
        rows.pack_rows_reference(source, places, count, expected)
        ours = out.to(device)
        rows.pack_rows(source.to(device), places.to(device), count.to(device), ours)
        assert torch.equal(ours.cpu(), expected)

    check()


@st.composite
def scatterings(draw: st.DrawFn) -> tuple[torch.dtype, int, list[int], int]:
    """Dtype, width, which requester each row is for, and the bucket."""
    targets = draw(st.lists(st.integers(0, 2), max_size=8))
    width = 4 * draw(st.sampled_from([1, 5, 700]))
    return draw(st.sampled_from(DTYPES)), width, targets, draw(st.integers(max(len(targets), 1), 9))


def test_scattered_rows_reach_their_senders(device: torch.device) -> None:
    @given(scatterings())
    def check(scattering: tuple[torch.dtype, int, list[int], int]) -> None:
        dtype, width, target, bucket = scattering
        values = random_rows(bucket, width, dtype, seed=3)
        place = [target[:number].count(requester) for number, requester in enumerate(target)]
        padding = [99] * (bucket - len(target))
        arguments = [
            torch.tensor(target + padding, dtype=torch.int32),
            torch.tensor(place + padding, dtype=torch.int32),
            torch.tensor([len(target)], dtype=torch.int32),
        ]
        expected = [random_rows(8, width, dtype, seed=n) for n in range(3)]
        ours = [tensor.to(device, copy=True) for tensor in expected]
        cpu = torch.device("cpu")
        rows.scatter_rows_reference(values, rows.RowTargets.of(expected, cpu), *arguments)
        rows.scatter_rows(
            values.to(device),
            rows.RowTargets.of(ours, device),
            *(argument.to(device) for argument in arguments),
        )
        for mine, theirs in zip(ours, expected, strict=True):
            assert torch.equal(mine.cpu(), theirs)

    check()


@pytest.mark.parametrize("num_bytes", [4, 256, 40_000, 300_000])
@pytest.mark.parametrize("rate", [0.0, 1e9])
def test_a_copy_is_complete(device: torch.device, num_bytes: int, rate: float) -> None:
    source = random_rows(1, num_bytes, torch.uint8, seed=num_bytes)[0].to(device)
    target = torch.zeros(num_bytes + 256, dtype=torch.uint8, device=device)
    copies.copy(target[:num_bytes], source, rate, programs=3)
    assert torch.equal(target[:num_bytes], source)
    assert not target[num_bytes:].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter has no clock")
def test_a_paced_copy_is_no_faster_than_its_link(device: torch.device) -> None:
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copies.copy(target, source, 10e9)  # compiled here
    torch.cuda.synchronize()
    started = time.monotonic()
    copies.copy(target, source, 10e9)
    torch.cuda.synchronize()
    assert time.monotonic() - started >= 0.95 * source.numel() / 10e9


def test_a_wait_for_a_timetable_ends(device: torch.device) -> None:
    clock = torch.zeros(1, dtype=torch.int64, device=device)
    for mark, wait in (
        (copies.mark, copies.wait_until),
        (copies.mark_reference, copies.wait_until_reference),
    ):
        started = time.monotonic()
        mark(clock)
        wait(clock, 0.02)
        wait(clock, 0.01)  # behind its time already
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
        assert seconds >= 0.019 or (device.type == "cpu" and mark is copies.mark)

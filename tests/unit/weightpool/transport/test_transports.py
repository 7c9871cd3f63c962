"""What holds for both transports: event semantics, order, alignment, turns, teardown. The CUDA one
runs over a driver without a GPU (`tests/support/fake_cuda.py`)."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sidp_sgl.weightpool.transport.cuda.streams import Copier
from sidp_sgl.weightpool.transport.interface import PeerStripe, Transport
from tests.support.transports import KINDS, FakeCudaTransport, make_transport, same

BYTES = 4096


@contextmanager
def connected(kind: str, num_readers: int = 1) -> Iterator[tuple[torch.Tensor, list]]:
    """An owner's memory, and (transport, its block) of every reader."""
    owner = make_transport(kind)
    readers: list[tuple[Transport, PeerStripe]] = []
    try:
        memory = owner.allocate(BYTES)
        assert memory.numel() == BYTES and not memory.any(), "zeroed"
        memory.copy_(torch.arange(BYTES) % 251)
        for _ in range(num_readers):
            reader = make_transport(kind)
            data = reader.connect(7, [os.dup(fd) for fd in owner.export()])
            readers.append((reader, PeerStripe(7, data[:BYTES])))
        yield memory, readers
    finally:
        for reader, _ in readers:
            reader.close()
        owner.close()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_fetch_brings_the_owners_bytes_as_they_are_now(kind: str) -> None:
    with connected(kind) as (memory, [(transport, block)]):
        target = transport.empty(BYTES)
        for value in (3, 4):
            memory.fill_(value)
            transport.copy_stream.copy(target, block)
            transport.copy_stream.synchronize()
            assert same(target, memory)


def test_a_wait_before_the_first_record_is_a_no_op(kind: str) -> None:
    with connected(kind) as (memory, [(transport, block)]):
        event, target = transport.event(), transport.empty(BYTES)
        transport.compute_stream.wait(event)
        transport.copy_stream.wait(event)
        transport.copy_stream.copy(target, block)
        transport.copy_stream.synchronize()
        assert same(target, memory)


def test_the_copy_stream_is_in_order(kind: str) -> None:
    with connected(kind) as (memory, [(transport, block)]):
        ones = transport.empty(BYTES).fill_(1)
        target = transport.empty(BYTES)
        for _ in range(20):
            transport.copy_stream.copy(target, PeerStripe(7, ones))
            transport.copy_stream.copy(target, block)
        transport.copy_stream.synchronize()
        assert same(target, memory)


def test_slots_and_blocks_are_aligned(kind: str) -> None:
    with connected(kind) as (memory, [(transport, block)]):
        assert memory.data_ptr() % 256 == block.data.data_ptr() % 256 == 0
        for num_bytes in (1, 255, 256, 10_000):
            slot = transport.empty(num_bytes)
            assert slot.numel() == num_bytes and slot.data_ptr() % 256 == 0


def test_an_owner_serves_one_reader_at_a_time(kind: str) -> None:
    """The second reader's fetch starts when the first one's turn has ended."""
    with connected(kind, 2) as (memory, [(first, block), (second, other)]):
        first.copy_stream.take_turn(block)
        first.copy_stream.synchronize()
        target, done = second.empty(BYTES), threading.Event()
        second.copy_stream.take_turn(other)
        second.copy_stream.copy(target, other)
        second.copy_stream.end_turn(other)

        def wait() -> None:
            second.copy_stream.synchronize()
            done.set()

        threading.Thread(target=wait, daemon=True).start()
        assert not done.wait(0.1)
        memory.fill_(9)
        first.copy_stream.end_turn(block)
        assert done.wait(10.0)
        assert same(target, memory)


def test_nobody_waits_for_ever_for_a_reader_that_keeps_its_turn(kind: str) -> None:
    with connected(kind, 2) as (memory, [(first, block), (second, other)]):
        first.copy_stream.take_turn(block)
        first.copy_stream.synchronize()
        started = time.monotonic()
        target = second.empty(BYTES)
        for _ in range(3):  # it is patient once
            second.copy_stream.take_turn(other)
            second.copy_stream.copy(target, other)
            second.copy_stream.end_turn(other)
        second.copy_stream.synchronize()
        assert 0.5 < time.monotonic() - started < 10.0
        assert same(target, memory)


def test_memory_without_blocks_can_be_offered(kind: str) -> None:
    owner, reader = make_transport(kind), make_transport(kind)
    owner.allocate(0)
    reader.connect(1, [os.dup(fd) for fd in owner.export()])
    reader.close()
    owner.close()


def test_close_is_idempotent(kind: str) -> None:
    with connected(kind) as (_, [(transport, block)]):
        target = transport.empty(BYTES)  # as a slot, it outlives the copy
        transport.copy_stream.copy(target, block)
        transport.close()
        transport.close()
        assert target.numel() == BYTES


def test_an_offer_is_two_descriptors_whatever_the_kind(kind: str) -> None:
    transport = make_transport(kind)
    transport.allocate(BYTES)
    assert len(transport.export()) == 2
    transport.close()


def test_slices_on_a_timetable_make_a_whole_block() -> None:
    owner, reader = FakeCudaTransport(), FakeCudaTransport(copier=Copier(1e5, 300))
    memory = owner.allocate(BYTES).copy_(torch.arange(BYTES) % 251)
    block = PeerStripe(7, reader.connect(7, [os.dup(fd) for fd in owner.export()]))
    target, started = reader.empty(BYTES), time.monotonic()
    reader.copy_stream.copy(target, block)
    reader.copy_stream.synchronize()
    assert same(target, memory)
    assert time.monotonic() - started >= 0.98 * BYTES / 1e5
    reader.close()
    owner.close()


def test_a_cpu_needs_neither_triton_nor_the_driver() -> None:
    program = (
        "import sys; from sidp_sgl.weightpool.transport.devices import make_transport; "
        "make_transport('cpu', None).close(); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    loaded = set(done.stdout.split())
    assert "sidp_sgl.weightpool.transport.shm.transport" in loaded
    assert not loaded & {"triton", "sidp_sgl.weightpool.transport.cuda"}

"""Transport `shm`: events as on a GPU, memory and turns between processes, the paced link."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from sidp_sgl.weightpool.transport.interface import PeerStripe, TransportError
from sidp_sgl.weightpool.transport.shm.memory import SharedIntegers
from sidp_sgl.weightpool.transport.shm.owner_link import OwnerLink
from sidp_sgl.weightpool.transport.shm.transport import ShmTransport
from tests.support.peers import Owner, owner_of_bytes

BYTES = 4096


@pytest.fixture
def owner() -> Iterator[Owner]:
    with owner_of_bytes(BYTES) as owner:
        yield owner


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def tickets_drawn(owner: Owner) -> int:
    shared = SharedIntegers(owner.transport.export()[1], 3)
    try:
        return shared[0]
    finally:
        shared.close()


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


def test_a_wait_before_the_first_record_is_a_no_op(owner: Owner) -> None:
    with owner.reader() as (transport, block):
        event = transport.event()
        transport.compute_stream.wait(event)
        target = transport.empty(BYTES)
        transport.copy_stream.wait(event)
        transport.copy_stream.copy(target, block)
        transport.copy_stream.synchronize()
        assert torch.equal(target, owner.memory)


def test_a_wait_captures_the_mark_at_the_call(owner: Owner) -> None:
    with owner_of_bytes(1) as other_owner, ExitStack() as stack:
        recorder, block = stack.enter_context(owner.reader())
        waiter, other_block = stack.enter_context(other_owner.reader())
        gate, other_gate = owner.link(), other_owner.link()
        gate.take_turn()
        other_gate.take_turn()
        event = recorder.event()
        recorder.copy_stream.record(event)  # first mark, reached at once
        recorder.copy_stream.synchronize()

        waiter.copy_stream.take_turn(other_block)  # held up here
        waiter.copy_stream.wait(event)  # asks for the first mark
        recorder.copy_stream.take_turn(block)  # held up here
        recorder.copy_stream.record(event)  # second mark, not reached
        other_gate.end_turn()
        waiter.copy_stream.synchronize()  # not held up by the second mark

        reached = threading.Event()

        def wait_for_second() -> None:
            waiter.compute_stream.wait(event)
            reached.set()

        threading.Thread(target=wait_for_second, daemon=True).start()
        assert not reached.wait(0.1)
        gate.end_turn()
        assert reached.wait(10.0)
        recorder.copy_stream.end_turn(block)


def test_the_copy_stream_is_in_order(owner: Owner) -> None:
    with owner.reader() as (transport, block):
        source = PeerStripe(block.owner, torch.ones(BYTES, dtype=torch.uint8))
        target = transport.empty(BYTES)
        for _ in range(50):
            transport.copy_stream.copy(target, source)
            transport.copy_stream.copy(target, block)
        transport.copy_stream.synchronize()
        assert torch.equal(target, owner.memory)


def test_slots_are_aligned_like_blocks() -> None:
    transport = ShmTransport()
    for num_bytes in (0, 1, 255, 256, 10_000):
        memory = transport.empty(num_bytes)
        assert memory.numel() == num_bytes
        assert num_bytes == 0 or memory.data_ptr() % 256 == 0
    transport.close()


CHILD = """
import sys
from sidp_sgl.weightpool.transport.shm.transport import ShmTransport
from sidp_sgl.weightpool.transport.interface import PeerStripe

transport = ShmTransport()
block = PeerStripe(0, transport.connect(0, [int(fd) for fd in sys.argv[1:]]))
target = transport.empty(block.data.numel())
print(int(block.data.long().sum()), flush=True)  # before the turn
transport.copy_stream.take_turn(block)
transport.copy_stream.copy(target, block)
transport.copy_stream.end_turn(block)
transport.copy_stream.synchronize()
print(int(target.long().sum()), flush=True)  # what was written while it waited
transport.close()
"""


def test_processes_share_memory_and_turns_by_file_descriptor(owner: Owner) -> None:
    gate = owner.link()
    gate.take_turn()
    fds = owner.transport.export()
    command = [sys.executable, "-c", CHILD, *map(str, fds)]
    with subprocess.Popen(command, pass_fds=fds, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            before = int(owner.memory.long().sum())
            assert int(child.stdout.readline()) == before
            wait_until(lambda: tickets_drawn(owner) == 2)
            owner.memory.fill_(7)
            gate.end_turn()
            assert int(child.stdout.readline()) == 7 * BYTES
            assert child.wait(30) == 0
        finally:
            child.kill()
    assert gate.take_turn()  # the child has ended its turn


def test_turns_are_first_come_first_served(owner: Owner) -> None:
    gate = owner.link()
    gate.take_turn()
    served: list[int] = []
    threads = []

    def reader(number: int) -> None:
        link = owner.link()
        assert link.take_turn(patience=20.0)
        served.append(number)
        time.sleep(0.002)
        assert served[-1] == number, "two readers at a time"
        link.end_turn()
        link.close()

    for number in range(8):
        threads.append(threading.Thread(target=reader, args=(number,)))
        threads[-1].start()
        wait_until(lambda drawn=number + 2: tickets_drawn(owner) == drawn)
    assert served == []
    gate.end_turn()
    for thread in threads:
        thread.join(20.0)
    assert served == list(range(8))


def test_nobody_waits_for_a_reader_that_was_stopped_in_its_turn(owner: Owner) -> None:
    stopped, reader, other = owner.link(), owner.link(), owner.link()
    assert stopped.take_turn()
    started = time.monotonic()
    assert not reader.take_turn(patience=0.1)
    assert 0.1 <= time.monotonic() - started < 5.0
    assert not reader.take_turn(patience=60.0), "it must not wait a second time"
    assert not other.take_turn(patience=0.1)
    assert reader.skipped_turns == 2 and other.skipped_turns == 1
    stopped.end_turn()  # goes on: the tickets given back are passed over
    for link in (reader, other, stopped):
        assert link.take_turn(patience=20.0)
        link.end_turn()


def test_a_holder_of_the_lock_that_was_stopped_blocks_nobody(owner: Owner) -> None:
    stopped, reader = owner.link(), owner.link()
    with stopped._shared.locked(1.0) as locked:
        assert locked
        assert not reader.take_turn()
    assert reader.take_turn()


@pytest.mark.parametrize("in_turns", [False, True])
@pytest.mark.parametrize("num_readers", [1, 3])
def test_readers_share_the_rate_of_one_link(owner: Owner, num_readers: int, in_turns: bool) -> None:
    """Never faster than the link; how much slower depends on the machine, so only that."""
    rate = 200_000.0  # bytes per second
    fetches = 4
    with ExitStack() as stack:
        readers = [stack.enter_context(owner.reader(rate)) for _ in range(num_readers)]
        started = time.monotonic()
        for transport, block in readers:
            for _ in range(fetches):
                if in_turns:
                    transport.copy_stream.take_turn(block)
                transport.copy_stream.copy(transport.empty(BYTES), block)
                if in_turns:
                    transport.copy_stream.end_turn(block)
        ends = []
        for transport, _ in readers:
            transport.copy_stream.synchronize()
            ends.append(time.monotonic() - started)
    assert max(ends) >= 0.98 * num_readers * fetches * BYTES / rate


def test_a_reader_books_the_link_in_pieces_only_without_a_turn(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    booked: list[int] = []
    monkeypatch.setattr(OwnerLink, "pace", lambda link, num_bytes: booked.append(num_bytes))
    with owner.reader(100_000.0) as (transport, block):
        target = transport.empty(BYTES)
        transport.copy_stream.copy(target, block)
        transport.copy_stream.synchronize()
        assert sum(booked) == BYTES and len(booked) == 16
        assert torch.equal(target, block.data)
        booked.clear()
        target.zero_()
        transport.copy_stream.take_turn(block)
        transport.copy_stream.copy(target, block)
        transport.copy_stream.end_turn(block)
        transport.copy_stream.synchronize()
        assert booked == [BYTES]
        assert torch.equal(target, block.data)


def test_an_idle_link_saves_nothing_up(owner: Owner) -> None:
    link = owner.link(1e6)
    link.pace(1000)
    time.sleep(0.05)
    started = time.monotonic()
    link.pace(20_000)
    assert time.monotonic() - started >= 0.0195
    link.close()


def test_a_failure_in_the_copy_stream_reaches_who_waits(owner: Owner) -> None:
    with owner.reader() as (transport, block):
        ready = transport.event()
        transport.copy_stream.copy(transport.empty(BYTES // 2), block)  # does not fit
        transport.copy_stream.record(ready)
        with pytest.raises(TransportError, match="the copy stream failed") as raised:
            transport.compute_stream.wait(ready)
        assert isinstance(raised.value.__cause__, RuntimeError)
        with pytest.raises(TransportError, match="the copy stream failed"):
            transport.copy_stream.synchronize()


def test_closing_in_the_middle_of_a_fetch_gives_the_turn_back(owner: Owner) -> None:
    """Ranks end at different times, always with fetches under way."""
    with owner.reader(40_000.0) as (transport, block):  # a fetch takes 0.1 s
        for _ in range(2):
            transport.copy_stream.take_turn(block)
            transport.copy_stream.copy(transport.empty(BYTES), block)
            transport.copy_stream.end_turn(block)
        wait_until(lambda: tickets_drawn(owner) == 1)
        transport.close()
    assert owner.link().take_turn()


def test_close_is_idempotent_and_leaves_no_descriptor() -> None:
    before = open_descriptors()
    with owner_of_bytes(BYTES) as owner, owner.reader() as (transport, block):
        transport.copy_stream.copy(transport.empty(BYTES), block)
        transport.close()
        transport.close()
        owner.transport.close()
    # Mappings hold descriptors of their own until their tensors are gone.
    del owner, transport, block
    assert open_descriptors() == before


def test_nothing_lies_in_dev_shm() -> None:
    """Memory is anonymous: it shows in the process's own maps, under no path."""
    with owner_of_bytes(BYTES) as owner, owner.reader():
        maps = Path("/proc/self/maps").read_text()
        assert "/memfd:sidp-blocks" in maps
        assert not [line for line in maps.splitlines() if "/dev/shm/" in line and "sidp" in line]

"""Device memory between ranks: what is said where GPUs can't reach each other or share none, and
that nothing is left behind."""

import os
import subprocess
import sys

import pytest

from sidp_sgl.weightpool.transport.cuda.memory import PeerMemory, SharedMemory
from sidp_sgl.weightpool.transport.interface import TransportError
from tests.support.fake_cuda import FakeCuda
from tests.support.transports import FakeCudaTransport

BYTES = 5000


def descriptors(memory: SharedMemory) -> list[int]:
    return [os.dup(fd) for fd in memory.file_descriptors()]


def test_a_peer_maps_the_same_memory() -> None:
    owner, reader = FakeCuda(), FakeCuda()
    before = len(os.listdir("/proc/self/fd"))
    memory = SharedMemory(owner, BYTES)
    assert memory.data.numel() == BYTES and not memory.data.any()
    peer = PeerMemory(reader, 3, descriptors(memory))
    memory.data.fill_(5)
    assert peer.num_bytes == BYTES and bool((peer.data == 5).all())
    memory.close()  # an owner that ends first takes no memory away
    assert bool((peer.data == 5).all())
    for thing in (memory, peer, memory, peer):
        thing.close()
    assert owner.live == reader.live == []
    assert len(os.listdir("/proc/self/fd")) == before


CHILD = """
import sys
from sidp_sgl.weightpool.transport.cuda.memory import PeerMemory
from tests.support.fake_cuda import FakeCuda
memory = PeerMemory(FakeCuda(), 0, [int(fd) for fd in sys.argv[1:]])
print(int(memory.data.long().sum()))
memory.data.fill_(2)
memory.close()
"""


def test_another_process_maps_it_by_file_descriptor() -> None:
    memory = SharedMemory(FakeCuda(), BYTES)
    memory.data.fill_(1)
    fds = memory.file_descriptors()
    command = [sys.executable, "-c", CHILD, *map(str, fds)]
    child = subprocess.run(command, pass_fds=fds, capture_output=True, text=True, timeout=60)
    assert child.stdout.split() == [str(BYTES)], child.stderr
    assert bool((memory.data == 2).all())
    memory.close()


@pytest.mark.parametrize(
    "call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemExportToShareableHandle"]
)
def test_memory_that_cannot_be_shared_says_why_and_leaves_nothing(call: str) -> None:
    driver = FakeCuda(device=2, num_devices=3)
    driver.refuse(call)
    with pytest.raises(TransportError) as raised:
        SharedMemory(driver, BYTES)
    line = str(raised.value)
    assert "\n" not in line
    for part in ("GPU 2 ", f"{BYTES} bytes", f"{call}: CUDA_ERROR_NOT_PERMITTED (800)", "free"):
        assert part in line
    assert driver.live == []


def test_gpus_without_peer_access_are_named() -> None:
    memory = SharedMemory(FakeCuda(device=2, num_devices=4), BYTES)
    reader = FakeCuda(device=1, num_devices=4, islands=((0, 1), (2, 3)))
    with pytest.raises(TransportError) as raised:
        PeerMemory(reader, 6, descriptors(memory))
    for part in ("GPU 1 ", "GPU 2 ", "DP rank 6", "nvidia-smi topo -m"):
        assert part in str(raised.value)
    assert reader.live == []
    assert PeerMemory(FakeCuda(3, 4, ((0, 1), (2, 3))), 6, descriptors(memory)).has_atomics


@pytest.mark.parametrize("call", ["cuMemImportFromShareableHandle", "cuMemSetAccess"])
def test_a_mapping_that_fails_says_whose_and_leaves_nothing(call: str) -> None:
    memory = SharedMemory(FakeCuda(), BYTES)
    reader = FakeCuda()
    reader.refuse(call)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransportError, match=f"DP rank 4: .*{call}.*nvidia-smi topo -m"):
        PeerMemory(reader, 4, descriptors(memory))
    assert reader.live == [] and len(os.listdir("/proc/self/fd")) == before


def test_without_atomics_fetches_take_no_turns() -> None:
    owner = FakeCudaTransport(FakeCuda(device=1, num_devices=2))
    reader = FakeCudaTransport(FakeCuda(device=0, num_devices=2, atomics=False))
    owner.allocate(BYTES)
    reader.connect(1, [os.dup(fd) for fd in owner.export()])
    assert reader.copy_stream._locks == {}
    reader.close()
    owner.close()
    assert reader.fake.live == owner.fake.live == []

"""Device memory between ranks: every kind of handle, what is said where GPUs can't reach each
other, and that nothing is left behind. And the driver's structures against cuda-bindings."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sidp_sgl.weightpool.transport.cuda import libcuda, libcuda_abi
from sidp_sgl.weightpool.transport.cuda.driver import HandleKind
from sidp_sgl.weightpool.transport.cuda.memory import PeerMemory, SharedMemory
from sidp_sgl.weightpool.transport.interface import TransportError
from tests.support.fake_cuda import FakeCuda
from tests.support.transports import FakeCudaTransport

BYTES = 5000


def descriptors(memory: SharedMemory) -> list[int]:
    return [os.dup(fd) for fd in memory.file_descriptors()]


@pytest.mark.parametrize("kind", HandleKind)
def test_a_peer_maps_the_same_memory(kind: HandleKind) -> None:
    owner, reader = FakeCuda(kinds=(kind,)), FakeCuda(kinds=(kind,))
    before = len(os.listdir("/proc/self/fd"))
    memory = SharedMemory(owner, BYTES)
    assert memory.kind is kind and memory.data.numel() == BYTES and not memory.data.any()
    peer = PeerMemory(reader, 3, descriptors(memory))
    memory.data.fill_(5)
    assert peer.num_bytes == BYTES and bool((peer.data == 5).all())
    memory.close()  # an owner that ends first takes no memory away
    assert kind is HandleKind.IPC or bool((peer.data == 5).all())
    for thing in (memory, peer, memory, peer):
        thing.close()
    assert owner.live == reader.live == []
    assert len(os.listdir("/proc/self/fd")) == before


CHILD = """
import sys
from pathlib import Path
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


def test_the_next_kind_is_taken_where_one_fails() -> None:
    driver = FakeCuda(kinds=tuple(HandleKind))
    driver.failing = {"cuMemExportToShareableHandle"}
    with pytest.raises(TransportError, match=r"can't share.*posix_fd: .*fabric: .*ipc: "):
        SharedMemory(driver, BYTES)
    assert driver.live == [], "what was allocated for a kind that fails is given back"
    driver = FakeCuda(kinds=(HandleKind.IPC,))
    assert SharedMemory(driver, BYTES).kind is HandleKind.IPC
    with pytest.raises(TransportError, match="supports none"):
        SharedMemory(FakeCuda(kinds=()), BYTES)


def test_gpus_without_peer_access_are_named() -> None:
    memory = SharedMemory(FakeCuda(device=2, num_devices=4), BYTES)
    reader = FakeCuda(device=1, num_devices=4, islands=((0, 1), (2, 3)))
    with pytest.raises(TransportError) as raised:
        PeerMemory(reader, 6, descriptors(memory))
    for part in ("GPU 1 ", "GPU 2 ", "DP rank 6", "nvidia-smi topo -m"):
        assert part in str(raised.value)
    assert reader.live == []
    assert PeerMemory(FakeCuda(3, 4, islands=((0, 1), (2, 3))), 6, descriptors(memory)).has_atomics


@pytest.mark.parametrize("call", ["cuMemImportFromShareableHandle", "cuMemSetAccess"])
def test_a_mapping_that_fails_says_whose_and_leaves_nothing(call: str) -> None:
    memory = SharedMemory(FakeCuda(), BYTES)
    reader = FakeCuda()
    reader.failing = {call}
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransportError, match=f"DP rank 4 .*{call}.*nvidia-smi topo -m"):
        PeerMemory(reader, 4, descriptors(memory))
    assert reader.live == [] and len(os.listdir("/proc/self/fd")) == before


def test_without_atomics_fetches_take_no_turns() -> None:
    owner = FakeCudaTransport(FakeCuda(device=1, num_devices=2))
    reader = FakeCudaTransport(FakeCuda(device=0, num_devices=2, atomics=False))
    owner.allocate(BYTES)
    reader.connect(1, [os.dup(fd) for fd in owner.export()])
    assert reader.copy_stream._ports == {}
    reader.close()
    owner.close()
    assert reader.fake.live == owner.fake.live == []


def test_the_drivers_structures_are_those_of_cuda_h() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    theirs = driver.CUmemAllocationProp()
    theirs.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    fd_kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    theirs.requestedHandleTypes = fd_kind
    theirs.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    theirs.location.id = 3
    ours = libcuda_abi.allocation_prop(3, HandleKind.POSIX_FD)
    size = ctypes.sizeof(ours)
    assert bytes(ours) == ctypes.string_at(theirs.getPtr(), size) and size == 32
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = 3
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    mine = libcuda_abi.access_desc(3)
    assert bytes(mine) == ctypes.string_at(access.getPtr(), ctypes.sizeof(mine))
    assert ctypes.sizeof(mine) == 12
    for size_of, name in ((64, "CUipcMemHandle"), (64, "CUmemFabricHandle")):
        assert hasattr(driver, name) and ctypes.sizeof(libcuda_abi.Bytes64) == size_of


def test_the_drivers_constants_are_those_of_cuda_h() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    abi, attribute = libcuda_abi, driver.CUdevice_attribute
    kinds = driver.CUmemAllocationHandleType
    p2p = driver.CUdevice_P2PAttribute
    pairs = {
        abi.HANDLE_TYPES[HandleKind.FABRIC]: kinds.CU_MEM_HANDLE_TYPE_FABRIC,
        abi.HANDLE_ATTRIBUTES[HandleKind.POSIX_FD]:
            attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
        abi.HANDLE_ATTRIBUTES[HandleKind.FABRIC]:
            attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED,
        abi.VMM_ATTRIBUTE: attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
        abi.MEM_OPS_64_BIT_ATTRIBUTE: attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS,
        abi.P2P_ACCESS: p2p.CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED,
        abi.P2P_NATIVE_ATOMICS: p2p.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED,
        abi.NOT_READY: driver.CUresult.CUDA_ERROR_NOT_READY,
    }  # fmt: skip
    for ours, theirs in pairs.items():
        assert ours == int(theirs), theirs


def test_every_call_of_the_driver_exists() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    source = Path(libcuda.__file__).read_text()
    names = {word.split('"')[0] for word in source.split('"cu')[1:]} - {"da:"}
    names = {name for name in names if name[:1].isupper()}
    assert len(names) > 25
    for name in names:
        assert hasattr(driver, "cu" + name.removesuffix("_v2")), name


def test_without_a_gpu_the_driver_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA"):
        libcuda.LibCuda()

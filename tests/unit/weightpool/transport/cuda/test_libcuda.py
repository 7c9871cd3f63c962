"""The driver's calls as they arrive on the other side: a stub compiled with cuda.h's prototypes
takes them, and notes their arguments."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton

from sidp_sgl.weightpool.transport.cuda import libcuda
from sidp_sgl.weightpool.transport.cuda.driver import CudaError, HandleKind
from sidp_sgl.weightpool.transport.cuda.libcuda import LibCuda

SOURCE = Path(__file__).parents[4] / "support" / "stub_libcuda.c"
HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
COMPILER = shutil.which("gcc") or shutil.which("cc")
HANDLE, ADDRESS, BIG = 0xABCDEF0123456789, 0x7F0000000000, 5 << 30
MIB = 1 << 20


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None or not (HEADERS / "cuda.h").exists():
        pytest.skip("needs a C compiler and Triton's cuda.h")
    path = tmp_path_factory.mktemp("stub") / "libcuda-stub.so"
    flags = ["-shared", "-fPIC", "-Wall", "-Werror", f"-I{HEADERS}"]
    subprocess.run([COMPILER, *flags, "-o", str(path), str(SOURCE)], check=True, timeout=60)
    return ctypes.CDLL(str(path))


@pytest.fixture
def driver(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[LibCuda]:
    """The real class over the stub, on device 3; PyTorch's part is left out."""
    monkeypatch.setattr(libcuda.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(libcuda.torch, "empty", lambda *args, **kwargs: None)
    yield LibCuda()


def said(library: ctypes.CDLL, since: int) -> list[str]:
    library.stub_log.restype = ctypes.c_char_p
    return library.stub_log().decode()[since:].splitlines()


@pytest.fixture
def start(driver: LibCuda, library: ctypes.CDLL) -> int:
    library.stub_log.restype = ctypes.c_char_p
    return len(library.stub_log())


def test_memory_by_handle(driver: LibCuda, library: ctypes.CDLL, start: int) -> None:
    assert driver.granularity(HandleKind.POSIX_FD) == 2 * MIB
    assert driver.create(BIG, HandleKind.FABRIC) == HANDLE
    assert driver.map(HANDLE, BIG, 2 * MIB) == ADDRESS
    driver.unmap(ADDRESS, BIG)
    driver.release(HANDLE)
    assert said(library, start) == [
        "granularity 1 1 1 3 1",
        f"create 1 8 1 3 {BIG} 0",
        f"reserve {BIG} {2 * MIB} 0 0",
        f"map {ADDRESS:x} {BIG} 0 {HANDLE:x} 0",
        f"access {ADDRESS:x} {BIG} 1 3 3 1",
        f"unmap {ADDRESS:x} {BIG}",
        f"unreserve {ADDRESS:x} {BIG}",
        f"release {HANDLE:x}",
    ]


def test_a_mapping_without_access_is_undone(
    driver: LibCuda, library: ctypes.CDLL, start: int
) -> None:
    driver.device = 9
    with pytest.raises(CudaError, match=r"cuMemSetAccess: CUDA_ERROR_INVALID_VALUE \(1\)"):
        driver.map(HANDLE, BIG, 2 * MIB)
    assert said(library, start)[-2:] == [
        f"unmap {ADDRESS:x} {BIG}",
        f"unreserve {ADDRESS:x} {BIG}",
    ]


def test_handles_that_travel(driver: LibCuda, library: ctypes.CDLL, start: int) -> None:
    assert driver.export_fd(HANDLE) == 77
    assert driver.import_fd(41) == 0x1122334455667788
    fabric = driver.export_fabric(HANDLE)
    assert fabric == bytes(number % 5 for number in range(64))
    assert driver.import_fabric(fabric) == 0x1122334455667788
    assert driver.alloc(BIG) == 0x7F1000000000
    handle = driver.ipc_handle(0x7F1000000000)
    assert handle == bytes(number % 7 for number in range(64))
    assert driver.ipc_open(handle) == 0x7F2000000000
    driver.ipc_close(0x7F2000000000)
    driver.free(0x7F1000000000)
    assert said(library, start) == [
        f"export {HANDLE:x} 1 0",
        "import 41 1",
        f"export {HANDLE:x} 8 0",
        f"import {sum((n + 1) * (n % 5) for n in range(64))} 8",
        f"alloc {BIG}",
        "ipc 7f1000000000",
        f"ipc open {sum((n + 1) * (n % 7) for n in range(64))} 1",
        "ipc close 7f2000000000",
        "free 7f1000000000",
    ]


def test_streams_and_events(driver: LibCuda, library: ctypes.CDLL, start: int) -> None:
    stream, event = driver.create_stream(), driver.create_event()
    driver.record(event, stream)
    driver.wait(0, event)
    driver.copy(ADDRESS, ADDRESS + BIG, BIG, stream)
    driver.write_word(stream, ADDRESS, 2**40 + 1)
    driver.destroy_event(event)
    driver.destroy_stream(stream)
    assert said(library, start) == [
        "stream 1 -5",
        "event 2",
        "record 99aabbccdd 5566778899",
        "wait 0 99aabbccdd 0",
        f"copy {ADDRESS:x} {ADDRESS + BIG:x} {BIG} 5566778899",
        f"write 5566778899 {ADDRESS:x} {2**40 + 1} 0",
        "destroy event 99aabbccdd",
        "destroy stream 5566778899",
    ]
    assert driver.is_capturing(stream) and not driver.is_capturing(0)
    assert driver.is_idle(0) and not driver.is_idle(1)
    with pytest.raises(CudaError, match="error 700"):
        driver.is_idle(2)


def test_facts_and_host_memory(driver: LibCuda, library: ctypes.CDLL, start: int) -> None:
    assert driver.uuid(1) == "1011120014151617" + "18191a1b1c1d1e1f"
    assert driver.can_access_peer(5) and not driver.has_peer_atomics(5)
    assert driver.supports(HandleKind.POSIX_FD) and driver.supports(HandleKind.IPC)
    assert not driver.supports(HandleKind.FABRIC)
    assert driver.register_host(ADDRESS, 8192) == ADDRESS + 0x1000
    driver.unregister_host(ADDRESS)
    driver.bind_thread()
    lines = said(library, start)
    assert lines[:2] == ["p2p 2 3 5", "p2p 3 3 5"]
    assert lines[-4:] == [
        f"register {ADDRESS:x} 8192 3",
        f"device pointer {ADDRESS:x} 0",
        f"unregister {ADDRESS:x}",
        "current 1234567890",
    ]

"""Memory between ranks, and how fast blocks are fetched from it."""

import os
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.device import Gpu
from bench.gpu.models import DECODERS
from bench.gpu.ranks import Rank, run_ranks
from sidp_sgl.weightpool.transport.cuda.memory import PeerMemory, SharedMemory

FETCH_TARGET = 0.95  # of a plain copy of the same size


def _share(rank: Rank, gpu: Gpu) -> bool:
    """Rank 0 owns; rank 1 maps, reads, and writes back."""
    driver, size = gpu.driver(), 5 << 20
    if rank.number == 0:
        memory = SharedMemory(driver, size)
        memory.data.copy_(torch.arange(size) % 251)
        gpu.synchronize()
        rank.exchange("there", memory.file_descriptors())
        rank.barrier()  # read and written
        is_right = bool((memory.data == 7).all())
        rank.barrier()  # unmapped
        memory.close()
        return is_right
    ((_, fds),) = rank.exchange("there").values()
    peer = PeerMemory(driver, 0, fds)
    is_right = torch.equal(peer.data.cpu(), (torch.arange(size) % 251).to(torch.uint8))
    peer.data.fill_(7)
    gpu.synchronize()
    rank.barrier()
    peer.close()
    rank.barrier()
    return is_right


def shared(gpu: Gpu) -> dict[str, Any]:
    """Two ranks share memory by file descriptor."""
    return {"ok": all(run_ranks(gpu, 2, _share))}


def _rates(rank: Rank, gpu: Gpu) -> dict[str, Any]:
    driver, size = gpu.driver(), int(DECODERS[0].ffn_bytes * gpu.scale) // 4096 * 4096
    memory = SharedMemory(driver, size)
    memory.data.random_(0, 255)
    gpu.synchronize()
    ((_, fds),) = rank.exchange("there", [os.dup(fd) for fd in memory.file_descriptors()]).values()
    peer = PeerMemory(driver, 1 - rank.number, fds)
    result: dict[str, Any] = {}
    if rank.number == 0:
        result = _measure(gpu, driver, peer.data, size)
    rank.barrier()  # the other rank's GPU work must not disturb
    peer.close()
    rank.barrier()
    memory.close()
    return result


def _measure(gpu: Gpu, driver: Any, peer: torch.Tensor, size: int) -> dict[str, Any]:
    own, target = driver.empty(size).random_(0, 255), driver.empty(size)

    def engine(slice_bytes: int) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, size, slice_bytes):
                length = min(slice_bytes, size - start)
                addresses = target.data_ptr() + start, peer.data_ptr() + start
                driver.copy(*addresses, length, driver.current_stream())

        return run

    ways: dict[str, Callable[[], None]] = {
        "plain copy of own memory": lambda: gpu.launch(lambda: target.copy_(own)),
        "fetch": engine(size),
        "fetch, 16 MiB slices": engine(16 << 20),
        "fetch, 2 MiB slices": engine(2 << 20),
    }
    rates, wrong = {}, []
    for name, run in ways.items():
        gpu.launch(lambda: target.fill_(0))
        rates[name] = round(size / gpu.seconds(run) / 1e9, 1)
        gpu.synchronize()
        if not torch.equal(target, own if name.startswith("plain") else peer):
            wrong.append(name)
    plain = rates["plain copy of own memory"]
    return {
        "bytes": size,
        "gigabytes_per_second": rates,
        "fetch_over_plain": round(rates["fetch"] / plain, 3),
        "target": f"fetch at least {FETCH_TARGET:.0%} of a plain copy",
        "target_met": rates["fetch"] >= FETCH_TARGET * plain,
        "wrong": wrong,
        "ok": not wrong,
        "note": "within one GPU: the link itself is not measured",
    }


def copy_rates(gpu: Gpu) -> dict[str, Any]:
    """Fetches of one FFN of Qwen3-32B from another rank's memory, against a plain copy."""
    return run_ranks(gpu, 2, _rates)[0]

"""The kernels on the GPU: their tests, and what one of them costs inside a graph."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.device import Gpu
from sidp_sgl.kernels import ticket_lock

KERNEL_TARGET = 5e-6  # seconds
_REPEATS = 200  # of a kernel within one graph


def tests(gpu: Gpu) -> dict[str, Any]:
    """tests/kernels, against the PyTorch references."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return {"ok": None, "skipped": f"not installed: {', '.join(missing)}"}
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    summary = re.findall(r"\d+ (?:passed|failed|skipped|error)", done.stdout)
    result: dict[str, Any] = {"summary": ", ".join(summary), "ok": done.returncode == 0}
    if not result["ok"]:
        result["output"] = (done.stdout + done.stderr)[-3000:]
    return result


def costs(gpu: Gpu) -> dict[str, Any]:
    """Seconds per kernel in a replayed graph, nobody waiting; the floor is an empty kernel."""
    lock = torch.empty(ticket_lock.LOCK_SIZE, dtype=torch.int64, device=gpu.device)
    reader = torch.zeros(ticket_lock.READER_SIZE, dtype=torch.int64, device=gpu.device)
    ticket_lock.reset(lock)
    number = torch.zeros(1, dtype=torch.int64, device=gpu.device)

    def hold() -> None:
        ticket_lock.acquire(lock, reader, 1.0)
        ticket_lock.release(lock, reader)

    def in_graph(kernel: Callable[[], object]) -> float:
        def step() -> None:
            for _ in range(_REPEATS):
                gpu.launch(kernel)

        return gpu.seconds(gpu.capture(step)) / _REPEATS

    result = {
        "acquire and release": in_graph(hold),
        "smallest kernel": in_graph(lambda: number.add_(0)),
    }
    gpu.synchronize()
    skipped = int(reader[2])
    return {
        "microseconds": {name: round(1e6 * seconds, 2) for name, seconds in result.items()},
        "went_on_without": skipped,
        "target": f"at most {1e6 * KERNEL_TARGET:.0f} us each",
        "target_met": result["acquire and release"] / 2 <= KERNEL_TARGET,
        "ok": skipped == 0,
    }

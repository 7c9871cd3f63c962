"""The kernels on the GPU: their tests, and what one of them costs inside a graph."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.device import Gpu
from sidp_sgl.kernels import flags, tickets

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
    device = gpu.device
    words = {name: torch.zeros(1, dtype=torch.int64, device=device) for name in ("counter", "seen")}
    error = torch.zeros(1, dtype=torch.int64, device=device)
    owner = torch.empty(tickets.OWNER_WORDS, dtype=torch.int64, device=device)
    reader = torch.zeros(tickets.READER_WORDS, dtype=torch.int64, device=device)
    tickets.reset(owner)

    def signal() -> None:
        flags.signal(words["counter"])

    def wait() -> None:
        flags.wait(words["counter"], words["seen"], error, 1, 1.0)

    def turn() -> None:
        tickets.take_turn(owner, reader, 1.0)
        tickets.end_turn(owner, reader)

    def in_graph(*kernels: Callable[[], object]) -> float:
        def step() -> None:
            for _ in range(_REPEATS):
                for kernel in kernels:
                    gpu.launch(kernel)

        return gpu.seconds(gpu.capture(step)) / _REPEATS

    signal_seconds = in_graph(signal)
    pair_seconds = in_graph(signal, wait)
    result = {
        "signal": signal_seconds,
        "wait": pair_seconds - signal_seconds,
        "turn, two kernels": in_graph(turn),
        "smallest kernel": in_graph(lambda: error.add_(0)),
    }
    gpu.synchronize()
    slowest = max(result["signal"], result["wait"], result["turn, two kernels"] / 2)
    return {
        "microseconds": {name: round(1e6 * seconds, 2) for name, seconds in result.items()},
        "error_word": int(error),
        "skipped_turns": int(reader[2]),
        "target": f"at most {1e6 * KERNEL_TARGET:.0f} us each",
        "target_met": slowest <= KERNEL_TARGET,
        "ok": int(error) == 0 and int(reader[2]) == 0,
    }

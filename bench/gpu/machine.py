"""Where a result comes from: GPUs, driver, versions. Needs no more than PyTorch and Triton."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "cuda-bindings", "sglang", "sglang-kernel", "flashinfer-python")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """A program's output; empty where it is missing or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> dict[str, Any]:
    """JSON values."""
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem"
    return {
        "command": " ".join(["python -m bench.gpu.verify", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "gpus": [
                {
                    "name": gpu.name,
                    "multiprocessors": gpu.multi_processor_count,
                    "memory_gib": round(gpu.total_memory / 2**30, 1),
                    "compute_capability": f"{gpu.major}.{gpu.minor}",
                }
                for gpu in gpus
            ],
            "nvidia_smi": _output("nvidia-smi", query, "--format=csv,noheader").splitlines(),
            "topology": _output("nvidia-smi", "topo", "-m").splitlines(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "software": {
            "python": platform.python_version(),
            "kernel": platform.release(),
            "cuda": torch.version.cuda,
            **{package: _version(package) for package in PACKAGES},
            "commit": _output("git", "rev-parse", "HEAD") or None,
        },
    }

"""Writes a bench's results beside the machine, versions and command that they come from."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("sidp-sgl", "sglang", "torch")


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median of repeats, and how far they lie apart."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
    }


def over(values: Sequence[float], base: Sequence[float]) -> dict[str, float | int]:
    """Spread of the ratios, repeat by repeat."""
    return spread([a / b for a, b in zip(values, base, strict=True)])


def record(name: str, results: dict[str, Any]) -> Path:
    """Write bench/results/NAME.json. `results`: JSON values, with seeds and repeats among them."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "bench": name,
        "command": command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "software": software(),
        "results": results,
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def command() -> str:
    """The command line, without the paths of this machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name}" if spec else Path(sys.argv[0]).name
    return " ".join(["python", program, *sys.argv[1:]])


def hardware() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],  # 1, 5 and 15 minutes
        "gpus": gpus(),
    }


def gpus() -> list[str]:
    """Name and driver of every NVIDIA GPU."""
    return _lines("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")


def software() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        **{package: version(package) for package in PACKAGES},
        "commit": next(iter(_lines("git", "rev-parse", "HEAD")), None),
        "changed_files": _lines("git", "status", "--porcelain", "--", "sidp_sgl", "bench/*.py"),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _lines(*arguments: str) -> list[str]:
    """Output lines of a program; none where it is missing or fails."""
    try:
        result = subprocess.run(
            arguments, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent.parent
        )
    except OSError:
        return []
    return result.stdout.splitlines() if result.returncode == 0 else []

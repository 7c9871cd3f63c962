"""python -m bench.gpu.verify: everything that needs a GPU, on the first machine that has one.

Each check runs in a process of its own with a time limit, so that one that fails or hangs stops no
other; all of it ends within eight minutes. Writes one JSON with hardware, versions and results,
and prints the targets beside what was measured. Needs PyTorch and Triton; SGLang only for `engine`.
"""

import argparse
import json
import multiprocessing
import os
import queue
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

OUTPUT = Path(__file__).parent.parent / "results" / "gpu_verify.json"
TOTAL_SECONDS = 460.0


class Check(NamedTuple):
    """`function`: module.name below bench.gpu; `seconds`: its limit."""

    name: str
    function: str
    seconds: float
    about: str


CHECKS = [
    Check("memory", "check_memory.shared", 120, "shared by file descriptor; two processes"),
    Check("pool", "check_pool.eager", 90, "every use of a layer sees its bytes; three orders"),
    Check("graphs", "check_pool.graphs", 120, "1,000 replays of captured steps; the self-check"),
    Check("kernels", "check_kernels.tests", 180, "tests/kernels against their references"),
    Check(
        "kernel_costs",
        "check_kernels.costs",
        40,
        "acquire and release: at most 5 us each",
    ),
    Check("copy_rates", "check_memory.copy_rates", 60, "fetch at least 95 % of a plain copy"),
    Check("cas", "check_cas.correct", 120, "rows to owners and back; three processes"),
    Check("round_trip", "check_cas.round_trip", 60, "CaS at most 20 us beyond the GEMM"),
    Check("overlap", "check_overlap.overlap", 120, "stall share over the batch at 400 GB/s"),
    Check("engine", "check_engine.engine", 225, "SGLang with colocated ranks; equal tokens"),
]


def _resolve(function: str) -> Callable[[Any], dict[str, Any]]:
    module, _, name = function.partition(".")
    return getattr(__import__(f"bench.gpu.{module}", fromlist=[name]), name)


def _run(check: Check, results: Any) -> None:
    os.setsid()  # its own children end with it
    try:
        from bench.gpu.device import Gpu

        results.put(_resolve(check.function)(Gpu()))
    except BaseException as error:
        results.put(
            {"ok": False, "error": repr(error)[:500], "trace": traceback.format_exc()[-4000:]}
        )


def run_check(check: Check, seconds: float) -> dict[str, Any]:
    """The check's result, or what became of it; never raises, never longer than `seconds`."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_run, args=(check, results))
    started = time.monotonic()
    process.start()
    result: dict[str, Any] = {"ok": False, "error": f"not done within {seconds:.0f} s"}
    while time.monotonic() - started < seconds:
        try:
            result = results.get(timeout=0.5)
            break
        except queue.Empty:
            if not process.is_alive() and results.empty():
                result = {"ok": False, "error": f"its process ended with {process.exitcode}"}
                break
    process.join(5.0 if result.get("error") is None else 0.5)
    try:
        os.killpg(process.pid or 0, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        if process.is_alive():
            process.kill()
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def _say(check: Check, result: dict[str, Any]) -> None:
    words = {True: "ok", False: "FAILED", None: "skipped"}
    print(f"{check.name:13} {words[result['ok']]:8} {result['seconds']:6.1f} s", flush=True)
    shown = {k: v for k, v in result.items() if k not in ("ok", "seconds", "trace")}
    for name, value in shown.items():
        print(f"    {name}: {json.dumps(value)[:1500]}", flush=True)


def dry_run(checks: list[Check]) -> None:
    """Say what would be done, and make sure that it could be: every check is imported."""
    print(f"would run, each in its own process, within {TOTAL_SECONDS:.0f} s in all:")
    for check in checks:
        _resolve(check.function)
        print(f"  {check.name:13} at most {check.seconds:4.0f} s  {check.about}")
    print(f"and write {OUTPUT.relative_to(OUTPUT.parent.parent.parent)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [check.name for check in CHECKS]
    parser.add_argument("--only", action="append", choices=names, help="this check; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="list the checks, run none")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON to be written")
    options = parser.parse_args(arguments)
    checks = [check for check in CHECKS if not options.only or check.name in options.only]
    if options.dry_run:
        dry_run(checks)
        return 0
    import torch

    if not torch.cuda.is_available():
        print("error: no NVIDIA GPU here: use --dry-run to see what would be run", file=sys.stderr)
        return 2
    from bench.gpu.machine import machine

    content: dict[str, Any] = {"bench": "gpu_verify", **machine(), "results": {}}
    started = time.monotonic()
    for check in checks:
        left = TOTAL_SECONDS - (time.monotonic() - started)
        if left < 10.0:
            content["results"][check.name] = {"ok": None, "skipped": "no time left", "seconds": 0.0}
        else:
            content["results"][check.name] = run_check(check, min(check.seconds, left))
        _say(check, content["results"][check.name])
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    failed = [name for name, result in content["results"].items() if result["ok"] is False]
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

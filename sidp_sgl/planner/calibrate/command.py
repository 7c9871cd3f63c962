"""`sidp-sgl calibrate`: measures this machine, and writes what plan and simulator read.

Every mistake of the user ends in one line (SidpUsageError).
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.planner.calibrate.device import hardware_name, num_gpus
from sidp_sgl.planner.calibrate.engine_steps import measure_steps
from sidp_sgl.planner.calibrate.fit import fit_machine
from sidp_sgl.planner.calibrate.group import measure_ranks
from sidp_sgl.planner.calibrate.points import Measurements
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import ModelShape, built_in_names, read_config, shape_from_config

DEFAULT_MODELS = {"cuda": "Qwen3-8B"}
SMALL: dict[str, Any] = {  # for CPUs: a step of it takes milliseconds
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 8,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
_MOST_RANKS = 64


def main(arguments: Sequence[str]) -> int:
    args = _parser().parse_args(arguments)
    device = args.device or ("cuda" if num_gpus() else "cpu")
    config, shape = _model(args, device)
    _check(args, device)
    content = calibrate(config, shape, args.num_ranks, device, args.link_gbps)
    try:
        args.out.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise SidpUsageError(f"--out {args.out} can't be written: {error.strerror}") from error
    print(_as_text(Machine.from_json(args.out, "--out")))
    print(f"written to {args.out}")
    return 0


def calibrate(
    config: dict[str, Any],
    shape: ModelShape,
    num_ranks: int,
    device: str,
    link_gbps: float | None,
) -> dict[str, Any]:
    """What the file holds: the machine, and all that it was made of. Takes a minute or two."""
    print(f"{num_ranks} ranks: GEMMs, fetches, calls, sums", file=sys.stderr)
    ranks = measure_ranks(device, shape, num_ranks, link_gbps)
    print("decode steps of SGLang", file=sys.stderr)
    steps, memory_bytes = measure_steps(config, num_ranks, device)
    hardware = hardware_name(device)
    name = f"{num_ranks} ranks on {hardware}"
    machine = fit_machine(Measurements(name, shape, num_ranks, memory_bytes, ranks, steps))
    points: dict[str, Sequence[Any]] = {
        "gemms": ranks.gemms,
        "fetches": ranks.fetches,
        "overlaps": ranks.overlaps,
        "calls": ranks.calls,
        "collectives": ranks.collectives,
        "steps": steps,
    }
    return {
        **machine.as_json(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("sidp-sgl", "sglang", "torch")},
        },
        "num_ranks": num_ranks,
        "device": device,
        "link_gbps": link_gbps,
        "model": asdict(shape),
        "copy_rate": ranks.copy_rate,
        "points": {name: [point._asdict() for point in each] for name, each in points.items()},
    }


def _model(args: argparse.Namespace, device: str) -> tuple[dict[str, Any], ModelShape]:
    name = args.model or DEFAULT_MODELS.get(device)
    config, name = read_config(name) if name else (SMALL, "small Qwen3")
    shape = shape_from_config(config, name)
    if shape.num_experts or shape.dtype != "bf16":
        raise SidpUsageError(
            f"--model {name} has experts or is quantised, which is not measured: give a dense "
            "model in 16 bits"
        )
    return config, shape


def _check(args: argparse.Namespace, device: str) -> None:
    if not 2 <= args.num_ranks <= _MOST_RANKS:
        raise SidpUsageError(
            f"--num-ranks {args.num_ranks} is out of range: use 2 to {_MOST_RANKS}, as --dp-size"
        )
    if args.link_gbps is not None and not 0 < args.link_gbps < float("inf"):
        raise SidpUsageError(f"--link-gbps {args.link_gbps:g} is out of range: use more than 0")
    if not args.out.absolute().parent.is_dir():
        raise SidpUsageError(
            f"--out {args.out}: there is no such folder: make it, or choose another"
        )
    if device == "cuda" and num_gpus() < args.num_ranks:
        raise SidpUsageError(
            f"--num-ranks {args.num_ranks} is more than the {num_gpus()} GPUs of this machine: "
            "use fewer, or --device cpu"
        )


def _as_text(machine: Machine) -> str:
    lines = [f"{machine.name}:"]
    for name, value in machine.as_json()["machine"].items():
        if name == "name":
            continue
        number = float(value)
        if name.endswith("seconds"):
            lines.append(f"  {name:26} {1e6 * number:12,.1f} µs")
        elif name == "copy_share":
            lines.append(f"  {name:26} {number:12.1%}")
        else:
            lines.append(f"  {name:26} {number / 1e9:12,.3f} G")
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SidpUsageError(f"{message} (see sidp-sgl calibrate --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sidp-sgl calibrate",
        description="Measures this machine for sidp-sgl plan --calibration and the simulator.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("calibration.json"), metavar="FILE",
        help="(default calibration.json)")  # fmt: skip
    add("--num-ranks", type=int, default=2, metavar="N",
        help="ranks that measure at the same time, as --dp-size (default 2)")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    add("--link-gbps", type=float, metavar="X", help="as the engine's --sidp-link-gbps")
    add("--model", metavar="MODEL", help="whose layers are measured, in two depths: config.json, "
        f"its folder, or one of {', '.join(built_in_names())} (default: a small one on CPUs, "
        f"{DEFAULT_MODELS['cuda']} on GPUs)")  # fmt: skip
    return parser

"""`sidp-sgl plan`: reads the flags, makes the plan, prints or draws it.

Every mistake of the user ends in one line (SidpUsageError).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sidp_sgl.config import FFN, PLACEMENTS, POOLS
from sidp_sgl.errors import SidpUsageError
from sidp_sgl.planner.deployment import Node
from sidp_sgl.planner.gpus import GPUS, Gpu, find_gpu, read_gpu, with_figures
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import DTYPES, built_in_names, load_model
from sidp_sgl.planner.plan.comparison import Plan, Workload, make_plan
from sidp_sgl.planner.plan.report import as_json, as_text

_MAX_GPUS = 72  # of one NVLink domain
_FIGURES = ("memory_gb", "hbm_gbps", "bf16_tflops", "fp8_tflops", "nvlink_gbps", "pcie_gbps")


def main(arguments: Sequence[str]) -> int:
    args = _parser().parse_args(arguments)
    plan = plan_of(args)
    if args.plot:
        from sidp_sgl.planner.plan.figure import draw

        draw(plan, args.plot)
    print(
        json.dumps(as_json(plan, args.model), indent=1) if args.json else as_text(plan, args.model)
    )
    return 0


def plan_of(args: argparse.Namespace) -> Plan:
    if not 0 < args.mem_fraction < 1:
        raise SidpUsageError(
            f"--mem-fraction {args.mem_fraction:g} is out of range: use more than 0 and less than "
            "1, for example 0.9"
        )
    if args.num_gpus > _MAX_GPUS:
        raise SidpUsageError(
            f"--num-gpus {args.num_gpus} is out of range: a group lies on one node, use 1 to "
            f"{_MAX_GPUS}"
        )
    node = Node(
        shape=load_model(args.model, args.dtype),
        machine=_machine(args),
        num_gpus=args.num_gpus,
        mem_fraction=args.mem_fraction,
        kv_dtype=args.kv_dtype,
        pool=args.pool,
        slots=args.slots,
        placement=args.placement,
    )
    return make_plan(node, Workload(args.input_len, args.output_len), args.tp, args.dp)


def _machine(args: argparse.Namespace) -> Machine:
    if args.calibration:
        if args.gpu or args.gpu_file:
            raise SidpUsageError("--calibration describes the machine: leave out --gpu")
        return Machine.from_json(args.calibration)
    return Machine.from_gpu(_gpu(args))


def _gpu(args: argparse.Namespace) -> Gpu:
    if args.gpu and args.gpu_file:
        raise SidpUsageError("--gpu and --gpu-file exclude each other: leave one of them out")
    if not args.gpu and not args.gpu_file:
        raise SidpUsageError(
            f"--gpu is missing: choose one of {', '.join(gpu.name for gpu in GPUS)}, or describe "
            "it with --gpu-file"
        )
    gpu = read_gpu(args.gpu_file) if args.gpu_file else find_gpu(args.gpu)
    given = {name: getattr(args, name) for name in _FIGURES}
    return with_figures(gpu, {name: value for name, value in given.items() if value is not None})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SidpUsageError(f"{message} (see sidp-sgl plan --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sidp-sgl plan",
        description="Compares DP, TP, DP attention, EP, DWDP, sharded_gpu and SiDP.",
        epilog=f"Built-in models: {', '.join(built_in_names())}.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="config.json, a folder that has one, or a built-in name")
    add("--gpu", help=", ".join(gpu.name for gpu in GPUS))
    add("--gpu-file", metavar="JSON", help="own GPU: a JSON object with the fields of planner Gpu")
    for name in _FIGURES:
        flag = "--" + name.replace("_", "-")
        add(flag, type=float, metavar="X", help="replaces this figure of the GPU")
    add("--calibration", metavar="JSON", help="written by sidp-sgl calibrate; instead of --gpu")
    add("--num-gpus", type=_count, default=8, metavar="N", help="GPUs of the node (default 8)")
    add("--tp", type=_count, metavar="N", help="only this tensor-parallel size")
    add("--dp", type=_count, metavar="N", help="only this data-parallel size")
    add("--input-len", type=_count, default=1024, metavar="N", help="tokens (default 1024)")
    add("--output-len", type=_count, default=1024, metavar="N", help="tokens (default 1024)")
    add("--mem-fraction", type=float, default=0.9, metavar="X", help="as SGLang's (default 0.9)")
    add("--pool", choices=POOLS, default=FFN, help="as --sidp-pool (default ffn)")
    add(
        "--slots",
        type=_count,
        metavar="N",
        help="as --sidp-cache-slots (default 3, with experts 2)",
    )
    add("--placement", choices=PLACEMENTS, default="interleaved", help="(default interleaved)")
    add("--dtype", choices=DTYPES, help="of the linear layers (default: the config's)")
    add("--kv-dtype", choices=DTYPES, default="bf16", help="of keys and values (default bf16)")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--plot", type=Path, metavar="PNG", help="draw step times and throughput")
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)

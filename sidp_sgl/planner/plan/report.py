"""A plan as text and as JSON.

GB are 10⁹ bytes; weights are those of one GPU, KV tokens those of the node.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sidp_sgl.planner.plan.comparison import Estimate, Plan
from sidp_sgl.planner.plan.reason import notes, reason
from sidp_sgl.planner.plan.start import start_command
from sidp_sgl.planner.weights import kv_bytes, num_parameters, part_bytes

_SETTINGS = ("setting", "weights", "KV", "KV tokens", "fit", "run", "step", "fetch", "thresh-")
_UNITS = ("", "GB/GPU", "GB/GPU", "of node", "per rank", "", "ms", "ms", "old")
_STEPS = ("batch", "all local", "fetches", "WaS", "CaS", "auto")
_STEP_UNITS = ("per rank", "ms", "ms", "ms", "ms", "")


def as_text(plan: Plan, model: str) -> str:
    """`model`: as the planner was given it."""
    node, load = plan.node, plan.workload
    lines = [
        f"{node.shape.name} ({num_parameters(node.shape) / 1e9:.2f} B parameters, "
        f"{node.shape.dtype}) on {node.num_gpus} x {node.machine.name}, "
        f"{load.input_len} + {load.output_len} tokens, memory fraction {node.mem_fraction:g}, "
        f"pool {node.pool}",
        "",
        *_table(
            [(*_SETTINGS, "tokens"), (*_UNITS, "per s")],
            [_row(estimate) for estimate in plan.estimates],
        ),
    ]
    if plan.sidp:
        lines += [
            "",
            f"A decode step with {plan.sidp.deployment.label}, "
            f"at {load.context:.0f} tokens per request:",
            "",
            *_table(
                [_STEPS, _STEP_UNITS],
                [
                    (
                        f"{row.batch:,}",
                        *map(_ms, (row.plain_seconds, row.fetch_seconds)),
                        *map(_ms, (row.was_seconds, row.cas_seconds)),
                        {"was": "WaS", "cas": "CaS"}[row.auto],
                    )
                    for row in plan.steps
                ],
            ),
        ]
    lines += ["", f"Best: {reason(plan)}"]
    lines += [f"Note: {note}." for note in notes(plan)]
    names = {"sidp": "With SiDP", "baseline": "Without"}
    lines += [f"{names[name]}: {command}" for name, command in _commands(plan, model).items()]
    return "\n".join(lines)


def _commands(plan: Plan, model: str) -> dict[str, str]:
    """How the best of both kinds are started."""
    both = {"sidp": plan.sidp, "baseline": plan.baseline}
    commands = {name: start_command(each, model) for name, each in both.items() if each}
    return {name: command for name, command in commands.items() if command}


def _row(estimate: Estimate) -> tuple[str, ...]:
    deployment = estimate.deployment
    weights = f"{deployment.memory.weight_bytes() / 1e9:.1f}"
    if not estimate.fits:
        return (deployment.label, weights, "does not fit", *[""] * 7)
    largest = deployment.max_running_requests()
    threshold = estimate.threshold
    return (
        deployment.label,
        weights,
        f"{_kv_gb(estimate):.1f}",
        f"{estimate.kv_tokens * deployment.dp:,}",
        f"{estimate.fitting:,}",
        f"{estimate.batch:,}",
        _ms(estimate.step_seconds),
        _ms(estimate.fetch_seconds) if estimate.fetch_seconds else "",
        "" if threshold is None else str(threshold) if threshold <= largest else "none",
        f"{estimate.tokens_per_second:,.0f}",
    )


def _kv_gb(estimate: Estimate) -> float:
    node, split = estimate.deployment.node, estimate.deployment.split
    return estimate.kv_tokens * kv_bytes(node.shape, split.attention, node.kv_dtype) / 1e9


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _table(head: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> list[str]:
    """First column to the left, the others to the right."""
    cells = [*head, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head[0]))]

    def line(row: Sequence[str]) -> str:
        first, *rest = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return [*map(line, head), rule, *map(line, rows)]


def as_json(plan: Plan, model: str) -> dict[str, Any]:
    """Seconds, bytes and tokens per second; KV tokens and batches of one rank."""
    node = plan.node
    return {
        "model": {**asdict(node.shape), "parameters": num_parameters(node.shape)},
        "machine": asdict(node.machine),
        "num_gpus": node.num_gpus,
        "mem_fraction": node.mem_fraction,
        "kv_dtype": node.kv_dtype,
        "pool": node.pool,
        "placement": node.placement,
        "workload": asdict(plan.workload),
        "settings": [_estimate_json(estimate) for estimate in plan.estimates],
        "steps": [asdict(row) for row in plan.steps],
        "best": plan.best.deployment.label,
        "worth_it": plan.best.is_sidp,
        "reason": reason(plan),
        "notes": notes(plan),
        "commands": _commands(plan, model),
    }


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    deployment, node = estimate.deployment, estimate.deployment.node
    return {
        "setting": deployment.label,
        "kind": deployment.kind,
        "mode": deployment.mode,
        "tp": deployment.tp,
        "dp": deployment.dp,
        "fits": estimate.fits,
        "parts": asdict(part_bytes(node.shape, deployment.split)),
        "memory": asdict(deployment.memory),
        "weight_bytes": deployment.memory.weight_bytes(),
        "slots": max(map(deployment.group.placement.slots, range(deployment.dp)))
        if estimate.is_sidp
        else 0,
        "kv_bytes_per_token": kv_bytes(node.shape, deployment.split.attention, node.kv_dtype),
        **{
            name: getattr(estimate, name)
            for name in (
                "kv_tokens",
                "fitting",
                "batch",
                "runs",
                "step_seconds",
                "compute_seconds",
                "fetch_seconds",
                "threshold",
                "hiding_batch",
                "prefill_seconds",
                "tokens_per_second",
            )
        },
    }

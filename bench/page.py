"""docs/benchmarks.md, made anew from what lies under bench/results/: `python -m bench.page`.

The one place for tables of what was measured; other pages cite a figure and link.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import (
    batch_memory,
    dispatch_overhead,
    fairness,
    growth,
    iteration_report,
    methods,
    owner_share,
    paper,
    peers,
    prefetch_order,
    prefill,
    residency,
    round_trip,
    sampling,
    scale,
    tail,
    validation_table,
    versions,
    was_throughput,
)
from bench.record import RESULTS
from bench.tables import Table, markdown

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
INTRODUCTION = """\
# Benchmarks

Made by `make bench` from the raw results under `bench/results/`, which have every repeat, the
seeds, the versions and the hardware. All sides of a comparison run in the same run, at the same
device memory, alternating; a range in brackets is that of the repeats. Without a GPU, ranks are CPU
processes that share the machine's cores, and a link is paced: ratios and shapes carry over, times
do not. `python -m bench.suite --only NAME` runs one of them.
"""


@dataclass(frozen=True)
class Section:
    """`name`: of the results and of the figure. `text` follows the tables."""

    name: str
    title: str
    about: str
    tables: tuple[Callable[[dict[str, Any]], Table], ...]
    text: Callable[[dict[str, Any]], str] | None = None
    figure: bool = False


def soaked(results: dict[str, Any]) -> Table:
    cas = results["cas"]
    rows = [
        ("minutes", f"{results['arguments']['minutes']:g}"),
        ("requests answered, some of them aborted", f"{results['answered']:,}"),
        ("rows sent / served", f"{cas['rows_sent']:,} / {cas['rows_served']:,}"),
        (
            f"steps: {' / '.join(results['iterations'])}",
            " / ".join(f"{n:,}" for n in results["iterations"].values()),
        ),
        ("mode switches", f"{results['mode_switches']:,}"),
        *((name, f"{cas[name]:,}") for name in ("declined", "silent", "fallbacks")),
        ("ranks stopped for a while", f"{results['stops']}"),
        ("problems", str(len(results["problems"]))),
    ]
    return ("what", "number"), rows


def killed(results: dict[str, Any]) -> Table:
    ends: dict[str, int] = {}
    for event in results["events"]:
        ends[event["event"]] = ends.get(event["event"], 0) + 1
    rows = [
        ("requests / records at the end", f"{results['requests']:,} / {results['records']:,}"),
        *((name, str(number)) for name, number in ends.items()),
        ("engine started again by the job", str(results["engine_restarts"])),
        ("problems", str(len(results["problems"]))),
    ]
    return ("what", "number"), rows


SECTIONS = (
    Section(
        "was_throughput",
        "Throughput against plain DP",
        "The demo model on four ranks, WaS only. Where plain DP is short of KV, SiDP runs larger "
        "batches; where KV is plentiful there is nothing to win and the cost shows. Plain DP and "
        "the first SiDP have SGLang's dispatcher (round robin), the second its own.",
        (was_throughput.table,),
    ),
    Section(
        "tail",
        "The tail of a job",
        "Long-tailed output lengths, four ranks, fetches of a step take four steps at batch 1. The "
        "paper has 1.07 to 1.09 with WaS only and 1.27 to 1.32 with both.",
        (tail.table,),
        figure=True,
    ),
    Section(
        "tail_tp2",
        "The tail of a job with tensor parallelism",
        "The same at TP 2 on every side, two ranks.",
        (tail.table,),
        figure=True,
    ),
    Section(
        "iteration_time",
        "A decode step over the batch",
        "Two ranks; the fetches of a step take five times a step at batch 1. The paper's Fig. 11.",
        (iteration_report.table,),
        iteration_report.summary,
        figure=True,
    ),
    Section(
        "residency",
        "A day: load comes, rises, falls and tails off",
        "The demo model on four ranks, SGLang's dispatcher on all sides; fetches of a step take "
        "four steps at batch 1. *Nothing stays*: the same SiDP engine with residency turned off.",
        (residency.table,),
        figure=True,
    ),
    Section(
        "prefill",
        "Prefill of a mixture",
        "Prompts of uneven length, answers of one token, a mixture whose experts fill the devices: "
        "all ranks stream the experts, send their rows, or choose. No rank waits for another.",
        (prefill.table,),
    ),
    Section(
        "prefetch_order",
        "Order of the fetches",
        "Step time over the ideal, of all ranks and of the slowest; f: time of a fetch, τ: compute "
        "of a layer. The event model with noise, and in perfect lock-step. The paper's order is "
        "`shifted` with d − 1 slots.",
        (prefetch_order.table,),
    ),
    Section(
        "round_trip",
        "Round trip of a remote unit",
        "CaS: one FFN of the demo model, owner and requester in processes of their own; medians.",
        (round_trip.table,),
    ),
    Section(
        "owner_share",
        "What serving costs an owner",
        "Its own step at batch 16, while the other rank is idle, streams from it, or sends it "
        "rows.",
        (owner_share.table,),
    ),
    Section(
        "growth",
        "How cost grows with the ranks",
        "Plain DP and SiDP up at once, all ranks on the same cores, link not paced, KV plentiful: "
        "what SiDP takes beyond plain DP is its overhead.",
        (growth.table,),
    ),
    Section(
        "prefix_dispatch",
        "Dispatch: prompts that share headers",
        "A few-shot evaluation: eight headers, 2,000 prompts in random order, four ranks whose KV "
        "cache does not hold all headers. SiDP on both sides.",
        (methods.table,),
    ),
    Section(
        "makespan",
        "Dispatch: long-tailed outputs",
        "Idle: share of the ranks' time without a request, to the end of the job.",
        (methods.table,),
    ),
    Section(
        "fairness",
        "Dispatch: who waits on an overloaded server",
        "Time to first token of clients that ask again as soon as they have their answer, several "
        "times as many as run at once; prompts behind eight headers. SiDP on both sides.",
        (fairness.table,),
    ),
    Section(
        "dispatch_overhead",
        "Dispatch: the policy's own time",
        "Per request, while 100,000 are queued; eight ranks.",
        (dispatch_overhead.table,),
    ),
    Section(
        "sampling",
        "Sampling with tensor parallelism",
        "From every TP rank's part of the logits to the token ids, as SGLang does it and shared "
        "([sampling.md](sampling.md)); without an engine, both in turn.",
        (sampling.measured_table, sampling.model_table),
        sampling.summary,
    ),
    Section(
        "batch_memory",
        "Offline jobs: memory and speed of the job's own process",
        "`run-batch` beside an engine that answers at once, 4,096 requests in flight.",
        (batch_memory.table,),
    ),
    Section(
        "peers",
        "Beside what SGLang itself offers",
        "One model of real sizes with random weights, all GPUs, the same share of their memory and "
        "the same job for every side. SGLang 0.5.23 has `sharded_gpu` for DeepSeek only.",
        (peers.table,),
    ),
    Section(
        "validate_model",
        "The planner's model against engines",
        "A calibrated machine, and what was predicted of it: decode steps, a job's throughput (by "
        "the simulator), the threshold that auto learns. A seeded Qwen3 of 16 layers; the fetches "
        "of a step take three steps at batch 1.",
        (validation_table.table,),
        validation_table.summary,
    ),
    Section(
        "paper",
        "The model against the paper",
        "What the paper reports, and what planner and simulator say to it; nothing is tuned. A "
        "range covers several models; agreement is a median within the band. *Our engine*: the "
        "planner's constants; *with 50 ms per step*: one assumption about the paper's testbed.",
        (paper.anchor_table, paper.job_table),
        paper.reasons,
        figure=True,
    ),
    Section(
        "scale",
        "Simulated: ranks of a group, and groups",
        "Qwen3-32B on H20, groups of eight GPUs; every GPU adds the same number of requests.",
        (scale.group_table, scale.gpu_table),
    ),
    Section(
        "soak",
        "Under random load and faults",
        "`make soak`: four ranks that switch modes, decline, answer late and are stopped; every "
        "answer is compared with that of an undisturbed run.",
        (soaked,),
    ),
    Section(
        "kills",
        "One offline job through many ends",
        "`make kills`: the job's process or a rank killed, the disk full; then the same command "
        "again.",
        (killed,),
    ),
    Section(
        "versions",
        "This version against an earlier one",
        "Time of a decode step, and of a token of the demo's job, new over base.",
        (versions.table,),
    ),
)


def page() -> str:
    parts = [INTRODUCTION]
    for section in SECTIONS:
        path = RESULTS / f"{section.name}.json"
        if path.exists():
            parts.append(section_text(section, json.loads(path.read_text())))
    return "\n".join(parts)


def section_text(section: Section, content: dict[str, Any]) -> str:
    results = content["results"]
    parts = [f"## {section.title}", section.about]
    parts += [markdown(*table(results)) for table in section.tables]
    if section.text is not None:
        parts.append(section.text(results))
    if section.figure:
        parts.append(f"![{section.title}](figures/{section.name}.png)")
    return "\n\n".join([*parts, origin(content)]) + "\n"


def origin(content: dict[str, Any]) -> str:
    """Command, machine and versions in one line."""
    hardware, software = content["hardware"], content["software"]
    gpus = f", {', '.join(hardware['gpus'])}" if hardware["gpus"] else ", no GPU"
    commit = (software["commit"] or "unknown")[:9] + ("+" if software["changed_files"] else "")
    return (
        f"`{content['command']}`, {content['date'][:10]}: {hardware['cpu']}, {hardware['cores']} "
        f"cores, {hardware['memory_gib']} GiB{gpus}; SGLang {software['sglang']}, PyTorch "
        f"{software['torch']}, commit {commit}."
    )


def write() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    write()

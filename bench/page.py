"""docs/benchmarks.md, made anew from what lies under bench/results/."""

import json
from typing import Any

from bench.page_sections import SECTIONS, Section
from bench.record import RESULTS
from bench.tables import DOCS, markdown

INTRODUCTION = """\
# Benchmarks

Made by `make bench` from the raw results under `bench/results/`, which have every repeat, the
seeds, the versions and the hardware. Both sides of a comparison run in the same run, at the same
device memory, alternating; a range in brackets is that of the repeats. Without a GPU, ranks are CPU
processes that share the machine's cores, and a link is paced: ratios and shapes carry over, times
do not. `python -m bench.suite --only NAME` runs one of them.
"""


def write() -> None:
    parts = [INTRODUCTION]
    for section in SECTIONS:
        path = RESULTS / f"{section.name}.json"
        if path.exists():
            parts.append(text(section, json.loads(path.read_text())))
    (DOCS / "benchmarks.md").write_text("\n".join(parts))


def text(section: Section, content: dict[str, Any]) -> str:
    """One section of the page."""
    heads, rows = section.table(content["results"])
    lines = [f"## {section.title}", "", section.about, "", markdown(heads, rows), ""]
    if section.figure:
        lines += [f"![{section.title}](figures/{section.name}.png)", ""]
    return "\n".join([*lines, origin(content), ""])


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

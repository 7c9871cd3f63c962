"""What the paper reports (SiDP, arXiv 2605.28095), and what the model says to it, figure by figure.

`modelled` has the model's values for one of MACHINES; several where a figure covers several
models or GPUs. Nothing is tuned for any figure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from bench.paper_jobs import (
    GPUS,
    MACHINES,
    MODELS,
    Case,
    best_at_equal_split,
    best_over_best,
    run,
)
from bench.simulator.costs import layered_step
from sidp_sgl.planner.deployment import REPLICAS, SIDP, Deployment, Node
from sidp_sgl.planner.models import load_model
from sidp_sgl.planner.time_model import Work

REASONS = {  # by figure: what would explain what the model does not
    "5": (
        "the ratios agree; 1.0 M tokens instead of 2.1 M is what the model has at a memory "
        "fraction of 0.6, and what else was in memory is not told."
    ),
    "6–8": (
        "at best splits a larger TP frees the same memory, and steps of a fast engine grow with "
        "the batch, so that more KV gains little: 1.3 to 1.5 would need a fixed part in every "
        "step, a baseline that may not choose its split, or a TP that is slower than in the model."
    ),
    "9": (
        "a roofline's steps are quicker than the prototype's, so that on H200 and B200 it takes "
        "larger batches to hide the fetches; 50 ms per step bring H200 to what is reported, and on "
        "B200 hide everything."
    ),
    "10": (
        "3.4 at DP8 is about what it costs when all seven readers meet at one owner in every layer "
        "(7 blocks of 0.53 of a layer's compute); here each owner skips its own layers, gets ahead "
        "and so breaks this up in any order, while shifting with d − 1 slots costs 17 to 33 %; 2.5 "
        "at DP4 is more than three blocks (1.65), unless copies lose rate where they meet."
    ),
    "11": (
        "agrees with our engine's constants, and not with 50 ms per step, which makes steps in CaS "
        "and WaS alike: the assumption that serves Fig. 12 contradicts this figure."
    ),
    "12": (
        "reached at equal splits with 50 ms per step, which a larger batch shares; against the "
        "best split of replicas neither column reaches it."
    ),
    "13": (
        "batches that fit at S = 4K do not hide 123 ms of fetches, so that streaming loses with a "
        "fast engine; with 50 ms per step WaS agrees, but CaS adds little, for an owner that "
        "computes for eight ranks of an H20 is faster than streaming up to batches of 16 or so."
    ),
    "15": (
        "the share depends on how long a job is beside its tail: about 0.9 and more where the room "
        "is filled ten times (table below)."
    ),
}


@dataclass(frozen=True)
class Anchor:
    """`low` to `high` is reported; agreement is a median within `band` of it."""

    figure: str
    what: str
    low: float
    high: float
    band: float
    modelled: Callable[[str], Sequence[float]]
    why: str  # what would explain the rest

    def agrees(self, values: Sequence[float]) -> bool:
        return self.low * (1 - self.band) <= median(values) <= self.high * (1 + self.band)


def _deployment(
    machine: str, model: str, gpu: str, kind: str, tp: int, dp: int, **fetches: Any
) -> Deployment:
    node = Node(load_model(model), MACHINES[machine](gpu), tp * dp, **fetches)
    return Deployment(node, kind, tp, dp, "auto" if kind == SIDP else "")


def kv_ratio(models: Sequence[str], tp: int, dp: int) -> Callable[[str], list[float]]:
    """Fig. 5."""

    def values(machine: str) -> list[float]:
        def tokens(model: str, kind: str) -> int:
            return _deployment(machine, model, "H20", kind, tp, dp).kv_tokens()

        return [tokens(model, SIDP) / tokens(model, REPLICAS) for model in models]

    return values


def kv_tokens(machine: str) -> list[float]:
    """Fig. 5: millions of tokens where plain DP does not fit."""
    models = ("Qwen2.5-72B", "Llama-3.1-70B")
    return [8 * _deployment(machine, m, "H20", SIDP, 1, 8).kv_tokens() / 1e6 for m in models]


def _fetches(order: str, dp: int) -> dict[str, Any]:
    """As the paper has it: one slot less than ranks, and nobody waits for a turn."""
    return {"order": order, "turns": False, "slots": dp - 1}


def hiding_batch(gpu: str) -> Callable[[str], list[float]]:
    """Fig. 9: Llama-3.1-70B, TP2, S = 1K; its DP is not told: 2 and 4."""

    def values(machine: str) -> list[float]:
        groups = (_deployment(machine, "Llama-3.1-70B", gpu, SIDP, 2, dp).group for dp in (2, 4))
        return [group.hiding_batch(1024, 4096) for group in groups]

    return values


def step_over_fetches(gpu: str, batches: Sequence[int]) -> Callable[[str], list[float]]:
    """Fig. 9: compute of a step over its fetches; TP2/DP2."""

    def values(machine: str) -> list[float]:
        group = _deployment(machine, "Llama-3.1-70B", gpu, SIDP, 2, 2).group
        works = [Work.decode(batch, 1024) for batch in batches]
        return [group.rank.compute_seconds(work) / group.fetch_seconds for work in works]

    return values


def peak_shifting(dp: int, jitter: float) -> Callable[[str], list[float]]:
    """Fig. 10: a step in layer order over one in shifted order, layer by layer; d - 1 slots."""

    def values(machine: str) -> list[float]:
        seconds = []
        for order in ("sequential", "shifted"):
            group = _deployment(machine, "Qwen3-32B", "H20", SIDP, 1, dp, **_fetches(order, dp))
            work = Work.decode(group.batch(1024), 1024)
            seconds.append(layered_step(group, work, jitter).slowest_rank)
        return [seconds[0] / seconds[1]]

    return values


def iteration(batches: Sequence[int], above: str, below: str) -> Callable[[str], list[float]]:
    """Fig. 11: Llama-3.1-70B, H20, TP2/DP2; ratio of two kinds of step."""

    def values(machine: str) -> list[float]:
        group = _deployment(machine, "Llama-3.1-70B", "H20", SIDP, 2, 2).group
        kinds = {
            "plain": group.rank.compute_seconds,
            "was": group.was_seconds,
            "cas": group.cas_seconds,
        }
        works = [Work.decode(batch, 1024) for batch in batches]
        return [kinds[above](work) / kinds[below](work) for work in works]

    return values


LENGTHS = ((1024, 1.0, 1.0), (2048, 1.0, 1.5), (4096, 1.3, 1.5))  # 2K: between the others
Gain = Callable[[Case], float]


def throughput(
    gpu: str, sequence: int, gain: Gain, fraction: float
) -> Callable[[str], list[float]]:
    """Figs 6 to 8 and 12."""

    def values(machine: str) -> list[float]:
        return [gain(Case(machine, gpu, model, sequence, fraction)) for model in MODELS]

    return values


TAIL = Case("engine", "H20", "Qwen3-32B", 4096)  # the only model that plain DP8 has room for


def tail(case: Case, mode: str) -> float:
    """Fig. 13."""
    plain = run(case, REPLICAS, 1).tokens_per_second
    return run(case, SIDP, 1, mode).tokens_per_second / plain


def was_share(case: Case) -> float:
    """Fig. 15: share of WaS among the decode steps of Fig. 13's job."""
    report = run(case, SIDP, 1, "auto")
    return report.steps("was") / (report.steps("was") + report.steps("cas"))


def of_tail(value: Callable[..., float], *args: str) -> Callable[[str], list[float]]:
    return lambda machine: [value(replace(TAIL, machine=machine), *args)]


def anchors(gpus: Sequence[str] = GPUS) -> list[Anchor]:
    found: list[Anchor] = []

    def add(key: str, what: str, low: float, high: float, band: float, modelled: Callable) -> None:
        found.append(Anchor(f"Fig. {key}", what, low, high, band, modelled, REASONS[key]))

    large = ("Llama-3.1-70B", "Qwen2.5-72B")
    add("5", "KV, SiDP over replicas, TP2/DP4, 70B and 72B", 1.7, 1.7, 0.1, kv_ratio(large, 2, 4))
    add("5", "the same, TP4/DP2, Qwen3-32B", 1.05, 1.05, 0.1, kv_ratio(["Qwen3-32B"], 4, 2))
    add("5", "KV of SiDP TP1/DP8, 70B and 72B (M tokens)", 1.0, 1.0, 0.1, kv_tokens)
    gains = ((best_over_best, "best splits"), (best_at_equal_split, "equal split"))
    for gain, how in gains:
        for gpu in gpus:
            for length, low, high in LENGTHS:
                what = f"throughput, {gpu}, S = {length // 1024}K, {how}"
                add("6–8", what, low, high, 0.1, throughput(gpu, length, gain, 0.9))
    for gpu, batch in (("H20", 128), ("H200", 256), ("B200", 256)):
        what = f"batch that hides the fetches, 70B, TP2, DP2 and DP4, {gpu}"
        add("9", what, batch, batch, 0.5, hiding_batch(gpu))
    for gpu, batches, low, high in (("H20", (256, 512), 3.0, 5.0), ("H200", (512,), 1.8, 1.8)):
        what = f"compute over fetches, TP2/DP2, {gpu}, B = {' and '.join(map(str, batches))}"
        add("9", what, low, high, 0.5, step_over_fetches(gpu, batches))
    for dp, reported in ((4, 2.5), (8, 3.4)):
        for jitter, ranks in ((0.0, "in lock-step"), (0.05, "5 % jitter")):
            what = f"peak shifting, gain at DP{dp}, ranks {ranks}"
            add("10", what, reported, reported, 0.25, peak_shifting(dp, jitter))
    was_cas = iteration((1, 2, 4, 8, 16, 32), "cas", "was")
    add("11", "step, CaS over WaS, B ≤ 32 (far below 1)", 0.0, 0.7, 0.0, was_cas)
    add("11", "step, WaS over plain, B = 128", 1.0, 1.0, 0.1, iteration((128,), "was", "plain"))
    add("11", "step, SiDP over plain, B = 1", 1.12, 1.12, 0.1, iteration((1,), "cas", "plain"))
    for gain, how in gains:
        for length, _, _ in LENGTHS:
            what = f"memory fraction 0.6, H200, S = {length // 1024}K, {how}"
            add("12", what, 1.24, 1.51, 0.1, throughput("H200", length, gain, 0.6))
    add("13", "throughput, WaS only over plain, DP8, S = 4K", 1.07, 1.09, 0.1, of_tail(tail, "was"))
    add("13", "throughput, WaS + CaS over plain", 1.27, 1.32, 0.1, of_tail(tail, "auto"))
    add("15", "share of WaS among decode steps", 0.9, 1.0, 0.0, of_tail(was_share))
    return found

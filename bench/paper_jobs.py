"""Simulated jobs behind bench/paper.py: throughput of every split of a node, with and without SiDP.

One workload for all figures, for the paper tells only the length S of a sequence: prompts and
outputs of S/2 tokens on average, log-normal, and three times as many requests as SiDP has room for.
SiDP runs in mode auto, with SGLang's limit of running requests or with the one that the planner
advises (its note on --max-running-requests), whichever is faster: a user would.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from bench.simulator import Job, Lengths, Report, Settings, make_requests, simulate
from sidp_sgl.planner.deployment import REPLICAS, SIDP, Deployment, Node
from sidp_sgl.planner.gpus import find_gpu
from sidp_sgl.planner.machine import Machine
from sidp_sgl.planner.models import load_model
from sidp_sgl.planner.plan.candidates import deployments
from sidp_sgl.planner.plan.comparison import Workload, estimate

MODELS = ("Qwen3-32B", "Qwen2.5-72B", "Llama-3.1-70B")
GPUS = ("H20", "H200", "B200")
SEQUENCES = (1024, 2048, 4096)
NUM_GPUS = 8
FILLINGS = 3  # of all room that SiDP has
TESTBED_STEP_SECONDS = 0.050
SEED = 0
_SPREADS = (0.3, 0.5)  # of prompts and of outputs: standard deviation of the logarithm


def engine(gpu: str) -> Machine:
    """The planner's constants: CUDA graphs, overlapped scheduling."""
    return Machine.from_gpu(find_gpu(gpu))


def testbed(gpu: str) -> Machine:
    """The one assumption about the paper's prototype: every step has a fixed time on top."""
    return replace(engine(gpu), step_seconds=TESTBED_STEP_SECONDS)


MACHINES: dict[str, Callable[[str], Machine]] = {"engine": engine, "testbed": testbed}


@dataclass(frozen=True)
class Case:
    """One comparison; `machine` is a key of MACHINES."""

    machine: str
    gpu: str
    model: str
    sequence: int
    mem_fraction: float = 0.9
    num_gpus: int = NUM_GPUS
    fillings: int = FILLINGS
    prompt_share: float = 0.5  # of a sequence

    @property
    def node(self) -> Node:
        machine = MACHINES[self.machine](self.gpu)
        return Node(load_model(self.model), machine, self.num_gpus, self.mem_fraction)

    def job(self) -> Job:
        shares = zip((self.prompt_share, 1 - self.prompt_share), _SPREADS, strict=True)
        prompts, outputs = (
            Lengths("log-normal", share * self.sequence, spread, self.sequence)
            for share, spread in shares
        )
        room = max(d.dp * d.batch(self.sequence) for d in candidates(self, SIDP))
        return Job(self.fillings * room, prompts, outputs)

    def advised_limit(self, deployment: Deployment) -> int | None:
        """The planner's --max-running-requests; None where all that fits is best."""
        prompt = round(self.prompt_share * self.sequence)
        advised = estimate(deployment, Workload(prompt, self.sequence - prompt))
        return advised.batch if advised.batch < advised.fitting else None


def candidates(case: Case, kind: str, mode: str = "auto") -> list[Deployment]:
    """Every split on which two requests of full length fit on a rank."""
    return [
        d
        for d in deployments(case.node)
        if d.kind == kind and d.mode in ("", mode) and d.kv_tokens() > 4 * case.sequence
    ]


@cache
def run(case: Case, kind: str, tp: int, mode: str = "", limit: int | None = None) -> Report:
    deployment = Deployment(case.node, kind, tp, case.num_gpus // tp, mode)
    settings = Settings(max_running_requests=limit)
    return simulate(deployment, make_requests(case.job(), SEED), settings=settings, seed=SEED)


@cache
def speeds(case: Case, kind: str) -> dict[int, float]:
    """TP → tokens per second."""
    found = {}
    for deployment in candidates(case, kind):
        limits = {None, case.advised_limit(deployment)} if kind == SIDP else {None}
        reports = [run(case, kind, deployment.tp, deployment.mode, limit) for limit in limits]
        found[deployment.tp] = max(report.tokens_per_second for report in reports)
    return found


def best_over_best(case: Case) -> float:
    """SiDP over replicas, each at its fastest split."""
    return max(speeds(case, SIDP).values()) / max(speeds(case, REPLICAS).values())


def best_at_equal_split(case: Case) -> float:
    """SiDP over replicas of the same TP, where that gains most."""
    sidp, plain = speeds(case, SIDP), speeds(case, REPLICAS)
    return max(sidp[tp] / plain[tp] for tp in sidp if tp in plain)

"""Compares all deployments for one workload: what fits, how fast it is, which is best and why."""

from dataclasses import dataclass, replace

from sidp_sgl.errors import SidpUsageError
from sidp_sgl.planner.deployment import SIDP, Deployment, Node
from sidp_sgl.planner.plan.candidates import deployments
from sidp_sgl.planner.time_model import Work
from sidp_sgl.scheduler.modes.policy import AUTO, CAS

WORTH = 1.02  # SiDP must gain this factor: less is within the model's error
ALIKE = 0.998  # settings that differ by less are equally fast


@dataclass(frozen=True)
class Workload:
    """Requests that are all alike; lengths in tokens."""

    input_len: int
    output_len: int

    @property
    def sequence(self) -> int:
        """What a request occupies at its end."""
        return self.input_len + self.output_len

    @property
    def context(self) -> float:
        """What a decode step sees of a request on average."""
        return self.input_len + self.output_len / 2


@dataclass(frozen=True)
class Estimate:
    """A deployment under the workload; batches are those of one rank, seconds are of a step.

    `fitting` requests have room, `batch` of them run: all, or, with SiDP, fewer where these can be
    sent. Where nothing fits both are 0 and there are no times.
    """

    deployment: Deployment
    kv_tokens: int  # of one rank
    fitting: int
    batch: int = 0
    runs: str = ""  # mode of the steps, of SiDP
    step_seconds: float = 0.0
    compute_seconds: float = 0.0
    fetch_seconds: float = 0.0
    threshold: int | None = None  # of SiDP auto; None without SiDP
    hiding_batch: int | None = None
    prefill_seconds: float = 0.0  # of one prompt
    tokens_per_second: float = 0.0  # of output, the whole node

    @property
    def fits(self) -> bool:
        return self.fitting > 0

    @property
    def is_sidp(self) -> bool:
        return self.deployment.kind == SIDP


@dataclass(frozen=True)
class StepRow:
    """A decode step of one rank at `batch`, in every mode of a SiDP group."""

    batch: int
    plain_seconds: float
    fetch_seconds: float
    was_seconds: float
    cas_seconds: float
    auto: str


@dataclass(frozen=True)
class Plan:
    node: Node
    workload: Workload
    estimates: tuple[Estimate, ...]
    best: Estimate
    baseline: Estimate | None  # the best without SiDP
    sidp: Estimate | None  # the best with it
    steps: tuple[StepRow, ...]  # of the latter's group


def make_plan(node: Node, workload: Workload, tp: int | None = None, dp: int | None = None) -> Plan:
    """Raises SidpUsageError where the workload is absurd, or nothing fits."""
    longest = node.shape.max_position
    if workload.sequence > longest:
        raise SidpUsageError(
            f"--input-len {workload.input_len} plus --output-len {workload.output_len} is more "
            f"than the {longest} positions of {node.shape.name}: shorten one of them"
        )
    estimates = tuple(estimate(d, workload) for d in deployments(node, tp, dp))
    fitting = [e for e in estimates if e.fits]
    if not fitting:
        most = max(e.kv_tokens for e in estimates)
        raise SidpUsageError(
            f"{node.shape.name} does not fit on {node.num_gpus} x {node.machine.name} with "
            f"--mem-fraction {node.mem_fraction:g} and {workload.sequence} tokens per request "
            f"(KV tokens left: {most}): use more or larger GPUs, --dtype fp8, or shorter requests"
        )
    baseline = _fastest([e for e in fitting if not e.is_sidp])
    sidp = _fastest([e for e in fitting if e.is_sidp])
    best = _best(baseline, sidp)
    steps = step_rows(sidp, workload) if sidp else ()
    return Plan(node, workload, estimates, best, baseline, sidp, steps)


def estimate(deployment: Deployment, workload: Workload) -> Estimate:
    """What `deployment` does in the long run, with the batch that is best for it."""
    fitting, kv_tokens = deployment.batch(workload.sequence), deployment.kv_tokens()
    if fitting == 0:
        return Estimate(deployment, kv_tokens, 0)
    if deployment.kind != SIDP:
        return _at_batch(deployment, workload, fitting, Estimate(deployment, kv_tokens, fitting))
    group, largest = deployment.group, deployment.max_running_requests()
    threshold = group.threshold(workload.context, largest)
    about = Estimate(
        deployment,
        kv_tokens,
        fitting,
        threshold=threshold,
        hiding_batch=group.hiding_batch(workload.context, largest),
    )
    # Tokens per second grow with the batch within a mode: the largest batches of both are enough.
    batches = {fitting, *({group.largest_sent(threshold, fitting)} - {0})}
    if deployment.mode != AUTO:
        sent = min(fitting, group.staging.rows_per_rank)
        batches = {fitting, sent} if deployment.mode == CAS else {fitting}
    best = _fastest([_at_batch(deployment, workload, b, about) for b in sorted(batches)])
    assert best is not None
    return best


def _at_batch(deployment: Deployment, workload: Workload, batch: int, about: Estimate) -> Estimate:
    step = deployment.decode_seconds(batch, workload.context, about.threshold or 0)
    prefill = deployment.prefill_seconds(workload.input_len)
    # In every step batch / output_len requests end, and as many prompts come in.
    seconds = step + batch / workload.output_len * prefill
    return replace(
        about,
        batch=batch,
        runs=deployment.runs(batch, about.threshold or 0),
        step_seconds=step,
        compute_seconds=deployment.rank.compute_seconds(Work.decode(batch, workload.context)),
        fetch_seconds=deployment.fetch_seconds(),
        prefill_seconds=prefill,
        tokens_per_second=deployment.dp * batch / seconds,
    )


def step_rows(sidp: Estimate, workload: Workload) -> tuple[StepRow, ...]:
    """Batch sizes 1, 2, 4, … up to what fits."""
    group, threshold = sidp.deployment.group, sidp.threshold or 0
    sizes = [2**n for n in range(sidp.fitting.bit_length())]
    rows = []
    for batch in sorted({*sizes, sidp.batch, sidp.fitting}):
        work = Work.decode(batch, workload.context)
        rows.append(
            StepRow(
                batch,
                plain_seconds=group.rank.compute_seconds(work),
                fetch_seconds=group.fetch_seconds,
                was_seconds=group.was_seconds(work),
                cas_seconds=group.cas_seconds(work),
                auto=group.runs(AUTO, batch, threshold),
            )
        )
    return tuple(rows)


def _fastest(estimates: list[Estimate]) -> Estimate | None:
    """The first of those that are as good as equally fast."""
    most = max((e.tokens_per_second for e in estimates), default=0.0)
    return next((e for e in estimates if e.tokens_per_second >= ALIKE * most), None)


def _best(baseline: Estimate | None, sidp: Estimate | None) -> Estimate:
    if baseline is None or sidp is None:
        best = baseline or sidp
        assert best is not None, "nothing fits"
        return best
    gain = sidp.tokens_per_second / baseline.tokens_per_second
    return sidp if gain > WORTH else baseline

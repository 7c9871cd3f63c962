"""The plan in one sentence: which setting, and why; and what to know beside it."""

from sidp_sgl.planner.deployment import SHARDED_GPU
from sidp_sgl.planner.plan.comparison import Estimate, Plan
from sidp_sgl.scheduler.modes.policy import CAS

_LITTLE = 1.15  # times the KV cache: what batches hardly feel


def reason(plan: Plan) -> str:
    """One sentence."""
    best, baseline, sidp = plan.best, plan.baseline, plan.sidp
    if baseline is None:
        assert sidp is not None
        return (
            f"{sidp.deployment.label}: without SiDP the weights leave no room for a request on any "
            f"split; with it {_batch(sidp)} run, and {_hiding(sidp)}."
        )
    if sidp is None:
        return (
            f"{baseline.deployment.label}: no split with data parallelism fits here, and SiDP "
            "shares weights between data-parallel ranks."
        )
    gain = sidp.tokens_per_second / baseline.tokens_per_second
    rival = baseline.deployment.label
    if best.is_sidp:
        return (
            f"{sidp.deployment.label}: {gain:.2f}x the tokens per second of {rival}, because "
            f"{_why(sidp, baseline)}, and {_hiding(sidp)}."
        )
    return (
        f"{rival}: SiDP is not worth it here ({sidp.deployment.label} reaches {gain:.2f}x), "
        f"because {_why_not(plan, sidp, baseline)}."
    )


def _why(sidp: Estimate, baseline: Estimate) -> str:
    if sidp.batch * sidp.deployment.dp > baseline.batch * baseline.deployment.dp:
        return f"{_batch(sidp)} run instead of {_batch(baseline)}"
    return (
        f"a step of {_batch(sidp)} takes {sidp.step_seconds * 1e3:.1f} ms instead of "
        f"{baseline.step_seconds * 1e3:.1f} ms of {_batch(baseline)}"
    )


def _batch(estimate: Estimate) -> str:
    dp = estimate.deployment.dp
    return f"{estimate.batch * dp:,} requests" + (f" ({estimate.batch:,} a rank)" if dp > 1 else "")


def _hiding(estimate: Estimate) -> str:
    compute, fetch = estimate.compute_seconds * 1e3, estimate.fetch_seconds * 1e3
    if estimate.runs == CAS:
        return f"rows are sent where fetches would take {fetch:.1f} ms (CaS)"
    if fetch == 0:
        return "every fetched layer keeps its slot"
    hides = "hides" if compute >= fetch else "does not hide"
    return f"a step's compute of {compute:.1f} ms {hides} its {fetch:.1f} ms of fetches"


def _why_not(plan: Plan, sidp: Estimate, baseline: Estimate) -> str:
    same = next(
        (
            e
            for e in plan.estimates
            if not e.is_sidp and e.deployment.tp == sidp.deployment.tp and e.kv_tokens
        ),
        baseline,
    )
    more = sidp.kv_tokens * sidp.deployment.dp / (same.kv_tokens * same.deployment.dp)
    if sidp.runs == CAS:
        return (
            f"batches that hide {sidp.fetch_seconds * 1e3:.1f} ms of fetches do not fit, and in "
            f"CaS {sidp.batch:,} requests a rank are the most"
        )
    if sidp.compute_seconds < sidp.fetch_seconds:
        return f"even with all memory in use {_hiding(sidp)}"
    if more < _LITTLE:
        return f"at {same.deployment.label} its KV cache is only {more:.2f}x as large"
    return (
        f"{_batch(baseline)} already keep the GPUs busy: {more:.2f}x the KV cache makes steps "
        f"longer, {baseline.step_seconds * 1e3:.1f} to {sidp.step_seconds * 1e3:.1f} ms"
    )


def notes(plan: Plan) -> list[str]:
    """What a reader should know beside the figures."""
    found = []
    best = plan.best
    if best.batch < best.fitting:
        found.append(f"limit the batch with --max-running-requests {best.batch}")
    kinds = {estimate.deployment.kind for estimate in plan.estimates}
    if SHARDED_GPU in kinds and plan.node.shape.latent is None:
        found.append("SGLang 0.5.23 has sharded_gpu for DeepSeek models only")
    return found

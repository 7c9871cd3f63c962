"""What serving costs an owner: its own decode step while another rank is idle, streams, or sends.

Two ranks, one core each. Rank 0 decodes a batch above the threshold all the while (WaS); rank 1 a
small one, by WaS in one engine and by CaS in the other, so that rank 0 serves it.
"""

import argparse
import statistics
from typing import Any, NamedTuple

from bench.constant_batch import ENVIRONMENT, INPUT_TOKENS, KEYWORDS, new_windows
from bench.demo_job import CHECKPOINT, make_prompts
from bench.record import over, record, spread
from bench.side import Side
from bench.tables import Table, plain, ranged

OWN_BATCH, SMALL_BATCH = 16, 4
SITUATIONS = ("other rank idle", "other rank streams", "other rank sends")


class Own(NamedTuple):
    """What rank 0 saw: the time of its step, and of the whole job."""

    step_seconds: float
    job_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=96, help="decode steps of a run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    common = {
        "model_path": str(CHECKPOINT),
        "dp_size": 2,
        "skip_tokenizer_init": True,
        "sidp": True,
        "sidp_residency": "off",
        **KEYWORDS,
    }
    environment = {**ENVIRONMENT, "SIDP_CPU_DEVICE_MEMORY": "256MB"}
    threshold = (OWN_BATCH + SMALL_BATCH) // 2
    with (
        Side("WaS", environment, {**common, "sidp_mode": "was"}) as was,
        Side("auto", environment, {**common, "sidp_batch_threshold": threshold}) as auto,
    ):
        times: dict[str, list[float]] = {name: [] for name in SITUATIONS}
        served: list[int] = []
        share: list[float] = []
        for repeat in range(args.repeats + 1):
            before = _own_state(auto)["sidp"]["cas"]
            sends = _run(auto, args, both=True)
            after = _own_state(auto)["sidp"]["cas"]
            runs = [_run(was, args, both=False), _run(was, args, both=True), sends]
            if repeat == 0:
                continue  # warm-up
            for name, own in zip(SITUATIONS, runs, strict=True):
                times[name].append(1e3 * own.step_seconds)
            served.append(after["rows_served"] - before["rows_served"])
            busy = after["busy_seconds"] - before["busy_seconds"]
            share.append(busy / sends.job_seconds)
    assert min(served) > 0
    ratios = {name: over(times[name], times[SITUATIONS[0]]) for name in SITUATIONS[1:]}
    results = {
        "arguments": vars(args),
        "batches": [OWN_BATCH, SMALL_BATCH],
        "own_step_ms": {name: spread(values) for name, values in times.items()},
        "over_idle": ratios,
        "rows_served": served,
        "service_share": spread(share),
    }
    record("owner_share", results)
    print(plain(*table(results)))


def table(results: dict[str, Any]) -> Table:
    heads = ["the other rank", "own step (ms)", "over idle", "time spent for it"]
    rows = [
        [
            situation.removeprefix("other rank "),
            ranged(times, 1),
            ranged(results["over_idle"][situation]) if situation in results["over_idle"] else "",
            f"{results['service_share']['median']:.1%}" if situation == SITUATIONS[-1] else "",
        ]
        for situation, times in results["own_step_ms"].items()
    ]
    return heads, rows


def _own_state(side: Side) -> dict[str, Any]:
    return next(state for state in side.states() if state["sidp"]["dp_rank"] == 0)


def _run(side: Side, args: argparse.Namespace, *, both: bool) -> Own:
    """Rank 0's step, beside those of rank 1 if `both`; the latter run for longer."""
    ranks = [0] * OWN_BATCH + [1] * (SMALL_BATCH if both else 0)
    prompts = make_prompts(len(ranks), INPUT_TOKENS, args.seed)
    sampling = [
        {"temperature": 0, "max_new_tokens": args.steps * (1 + 2 * rank), "ignore_eos": True}
        for rank in ranks
    ]
    before = _own_state(side)
    job = side.run(prompts, sampling, ranks=ranks)
    windows = new_windows(before, _own_state(side), OWN_BATCH)
    return Own(statistics.median(windows), job.seconds)


if __name__ == "__main__":
    main()

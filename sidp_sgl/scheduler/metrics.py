"""The Prometheus metrics of a rank: their names, their meaning, and where each value comes from.

Room: scheduler. Pure: `sglang_hooks/metrics.py` hands the values to prometheus_client.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GAUGE, COUNTER = "gauge", "counter"
PREFIX = "sglang:sidp_"
MODE_CODES = {"was": 0, "cas": 1}


@dataclass(frozen=True)
class Metric:
    """One value of the `sidp` dictionary in /server_info.

    `name` carries SGLang's prefix; a counter's series ends in `_total` beside it.
    """

    name: str
    kind: str
    path: tuple[str, ...]  # keys into the dictionary, outermost first
    meaning: str
    labels: tuple[tuple[str, str], ...] = ()  # beside those of SGLang's own metrics

    @property
    def series(self) -> str:
        """The name in /metrics."""
        return self.name + ("_total" if self.kind == COUNTER else "")


def value_of(metric: Metric, status: Mapping[str, Any]) -> float | None:
    """None where the rank has no such value now, for example without a compute service."""
    value: Any = status
    for key in metric.path:
        value = value.get(key)
        if value is None:
            return None
    if metric.path == ("mode",):
        return float(MODE_CODES[value])
    return float(len(value) if isinstance(value, list) else value)


def _metric(kind: str, path: str, meaning: str, name: str = "", **labels: str) -> Metric:
    keys = tuple(path.split("."))
    return Metric(PREFIX + (name or "_".join(keys)), kind, keys, meaning, tuple(labels.items()))


def _gauges(meanings: Mapping[str, str]) -> tuple[Metric, ...]:
    return tuple(_metric(GAUGE, path, meaning) for path, meaning in meanings.items())


def _counters(meanings: Mapping[str, str]) -> tuple[Metric, ...]:
    return tuple(_metric(COUNTER, path, meaning) for path, meaning in meanings.items())


METRICS = (
    *_gauges(
        {
            "mode": "Mode of the latest decode step: 0 is WaS, 1 is CaS.",
            "batch_threshold": "Batch size from which WaS is used.",
            "owned_layers": "Layers whose block this rank owns.",
            "pooled_bytes": "Bytes of all pooled weights, of all ranks.",
            "owned_bytes": "Bytes of the blocks that this rank owns.",
            "replicated_bytes": "Bytes of the weights that every rank holds.",
            "cache_slots": "Slots, each for one fetched block.",
            "cache_bytes": "Bytes of the slots.",
            "staging_bytes": "Bytes of the staging areas for CaS.",
            "checkpoint_bytes_read": "Bytes read from the checkpoint at start.",
            "placeholders_unmaterialised": "Tensors of other ranks that never took memory here.",
            "kv_capacity_tokens": "Tokens that the KV cache holds.",
            "kv_headroom_tokens": "Tokens that the KV cache can still admit: free and evictable.",
            "running_batch_size": "Running requests.",
            "waiting_requests": "Requests that wait at this rank.",
            "dispatch.queued": "Requests that wait in the DP controller; the same on all ranks.",
            "cas.service_share": "Part of the last second in which this rank served others.",
        }
    ),
    _metric(COUNTER, "iterations.was", "Steps by mode.", "iterations", mode="was"),
    _metric(COUNTER, "iterations.cas", "Steps by mode.", "iterations", mode="cas"),
    *_counters(
        {
            "mode_switches": "Changes of mode between two decode steps.",
            "dispatch.sent": "Requests sent to ranks; the same on all ranks.",
            "dispatch.moved": "Waiting requests moved to another rank; the same on all ranks.",
            "was.fetches": "Blocks fetched.",
            "was.bytes": "Bytes of the blocks fetched.",
            "was.stall_seconds": "Seconds that the compute waited for fetches.",
            "was.resyncs": "Times that the prefetch began anew at a layer asked for out of order.",
            "was.replays": "WaS steps that were CUDA graphs.",
            "cas.requests": "Steps for which leases were asked for.",
            "cas.granted": "Steps that got all their leases.",
            "cas.declined": "Steps that an owner declined.",
            "cas.silent": "Steps whose answers did not come in time.",
            "cas.stale": "Answers that came for a step that was over.",
            "cas.calls": "Units computed by their owner for this rank.",
            "cas.rows_sent": "Rows sent to owners.",
            "cas.fallbacks": "Units of CaS steps that were computed here after all.",
            "cas.wait_seconds": "Seconds that this rank waited for results.",
            "cas.replays": "CaS steps whose parts between the calls were CUDA graphs.",
            "cas.rows_served": "Rows computed for other ranks.",
            "cas.gemms": "GEMMs computed for other ranks.",
            "cas.fused_gemms": "Those over the rows of more than one rank.",
            "cas.failed": "Calls of other ranks that failed here.",
            "cas.busy_seconds": "Seconds spent computing for other ranks.",
            "cas.negotiation_seconds": "Seconds that this rank waited for leases.",
            "cas.sent_messages": "Control messages sent.",
            "cas.dropped_messages": "Control messages dropped, for their receiver did not read.",
            "cas.malformed_messages": "Control messages that could not be read.",
        }
    ),
)  # fmt: skip

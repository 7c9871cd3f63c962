"""What a rank says of itself, written once: the fields of `Status`, each with its meaning.

From them follow the `sidp` dictionary in /server_info (`asdict`), the Prometheus metrics, SiDP's
part of the decode log line, and the table in docs/metrics.md. Sizes are in bytes, times in seconds,
as the names say; counters count since the start.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from functools import partial, reduce
from operator import getitem
from typing import Annotated, Any, get_type_hints

GAUGE, COUNTER = "gauge", "counter"
PREFIX = "sglang:sidp_"
MODE_CODES = {"was": 0, "cas": 1, "local": 2}


@dataclass(frozen=True)
class Log:
    """A part of the log line: how far a counter has come since the line before, times `scale`."""

    text: str  # with a place for the number
    scale: float = 1.0
    is_always_there: bool = False  # also where nothing has come


@dataclass(frozen=True)
class About:
    """What there is to say about a field of `Status`."""

    meaning: str
    kind: str = ""  # of its metric, if it has one
    log: Log | None = None
    label: str = ""  # of the metric: the field's own name is its value, and is not in the metric's


gauge = partial(About, kind=GAUGE)
counter = partial(About, kind=COUNTER)


@dataclass(frozen=True)
class DispatchStatus:
    """Of the DP controller; the same on all ranks."""

    method: Annotated[str, About("Who dispatches: `sidp`, or `sglang` with a method of its own.")]
    queued: Annotated[int, gauge("Requests that wait in the DP controller; the same on all ranks.")]
    sent: Annotated[int, counter("Requests sent to ranks; the same on all ranks.")]
    moved: Annotated[int, counter("Waiting requests moved to another rank; the same on all ranks.")]


@dataclass(frozen=True)
class SelfCheckStatus:
    """Of the start, but for `canaries`; all 0 where it did not run."""

    level: Annotated[str, About("As `--sidp-self-check`.")]
    blocks: Annotated[int, About("Blocks of other ranks that had their owners' bytes here.")]
    bytes: Annotated[int, About("Bytes of these.")]
    captured_blocks: Annotated[int, About("Those that were fetched in a CUDA graph as well.")]
    owners_called: Annotated[int, About("Owners that computed rows as they are computed here.")]
    skipped_turns: Annotated[int, About("Fetches that went on without their turn at an owner.")]
    seconds: Annotated[float, About("Seconds that it took.")]
    canaries: Annotated[int, About("Blocks compared while running.")]


@dataclass(frozen=True)
class WasStatus:
    fetches: Annotated[int, counter("Blocks fetched.")]
    bytes: Annotated[
        int, counter("Bytes of the blocks fetched.", log=Log("fetched {:.1f} MB", 1e-6, True))
    ]
    stall_seconds: Annotated[
        float,
        counter(
            "Seconds that the compute waited for fetches.", log=Log("stalled {:.1f} ms", 1e3, True)
        ),
    ]
    resyncs: Annotated[
        int, counter("Times that the prefetch began anew at a block asked for out of order.")
    ]
    replays: Annotated[int, counter("WaS steps that were CUDA graphs.")]


@dataclass(frozen=True)
class StepsStatus:
    was: Annotated[int, counter("Steps by mode.", label="mode")]
    cas: Annotated[int, counter("Steps by mode.", label="mode", log=Log("{:.0f} CaS steps"))]
    local: Annotated[int, counter("Steps by mode.", label="mode", log=Log("{:.0f} local steps"))]


@dataclass(frozen=True)
class ResidencyStatus:
    """All 0 where blocks may not stay."""

    blocks: Annotated[int, gauge("Blocks of other ranks that stay for now, in KV memory.")]
    needed: Annotated[int, gauge("Blocks that would have to stay for steps to be local.")]
    tokens: Annotated[int, gauge("Tokens that this memory would hold; they count as headroom.")]
    kept: Annotated[int, counter("Blocks that came to stay.")]
    dropped: Annotated[int, counter("Those that went, for their memory was needed.")]


@dataclass(frozen=True)
class CasStatus:
    rows_per_rank: Annotated[int, About("Rows of a step that may be sent; 0 where none may.")]
    requests: Annotated[int, counter("Steps for which leases were asked for.")]
    granted: Annotated[int, counter("Steps that got all their leases.")]
    declined: Annotated[int, counter("Steps that an owner declined.")]
    silent: Annotated[int, counter("Steps whose answers did not come in time.")]
    stale: Annotated[int, counter("Answers that came for a step that was over.")]
    negotiation_seconds: Annotated[float, counter("Seconds that this rank waited for leases.")]
    calls: Annotated[int, counter("Units computed by their owner for this rank.")]
    rows_sent: Annotated[int, counter("Rows sent to owners.", log=Log("sent {:.0f} rows"))]
    wait_seconds: Annotated[
        float,
        counter("Seconds that this rank waited for results.", log=Log("waited {:.1f} ms", 1e3)),
    ]
    fallbacks: Annotated[int, counter("Units of CaS steps that were computed here after all.")]
    replays: Annotated[int, counter("CaS steps whose parts between the calls were CUDA graphs.")]
    rows_served: Annotated[
        int, counter("Rows computed for other ranks.", log=Log("served {:.0f} rows"))
    ]
    gemms: Annotated[int, counter("GEMMs computed for other ranks.")]
    fused_gemms: Annotated[int, counter("Those over the rows of more than one rank.")]
    failed: Annotated[int, counter("Calls of other ranks that failed here.")]
    busy_seconds: Annotated[float, counter("Seconds spent computing for other ranks.")]
    service_share: Annotated[
        float, gauge("Part of the last second in which this rank served others.")
    ]
    declines_given: Annotated[dict[str, int], About("Requests of others declined, by reason.")]
    sent_messages: Annotated[int, counter("Control messages sent.")]
    dropped_messages: Annotated[
        int, counter("Control messages dropped, for their receiver did not read.")
    ]
    malformed_messages: Annotated[int, counter("Control messages that could not be read.")]


@dataclass(frozen=True)
class Status:
    """Of one rank's process."""

    enabled: Annotated[bool, About("Always true: the process pools weights.")]
    dp_rank: Annotated[int, About("Rank of the replica.")]
    dp_size: Annotated[int, About("Replicas of the engine.")]
    tp_rank: Annotated[int, About("Rank of the process in its replica.")]
    tp_size: Annotated[int, About("Processes of a replica.")]
    pool: Annotated[str, About("As `--sidp-pool`.")]
    placement: Annotated[str, About("As `--sidp-placement`.")]
    owned_layers: Annotated[list[int], gauge("Layers whose block this rank owns.")]
    pooled_bytes: Annotated[int, gauge("Bytes of all pooled weights, of all ranks.")]
    owned_bytes: Annotated[int, gauge("Bytes of the blocks that this rank owns.")]
    replicated_bytes: Annotated[int, gauge("Bytes of the weights that every rank holds.")]
    cache_slots: Annotated[int, gauge("Slots, each for one fetched block.")]
    cache_bytes: Annotated[int, gauge("Bytes of the slots.")]
    staging_bytes: Annotated[int, gauge("Bytes of the staging areas for CaS.")]
    checkpoint_bytes_read: Annotated[int, gauge("Bytes read from the checkpoint at start.")]
    placeholders_unmaterialised: Annotated[
        int, gauge("Tensors of other ranks that never took memory here.")
    ]
    kv_capacity_tokens: Annotated[int, gauge("Tokens that the KV cache holds.")]
    kv_headroom_tokens: Annotated[
        int, gauge("Tokens that the KV cache can still admit: free and evictable.")
    ]
    running_batch_size: Annotated[int, gauge("Running requests.")]
    waiting_requests: Annotated[int, gauge("Requests that wait at this rank.")]
    dispatch: DispatchStatus
    mode: Annotated[str, gauge("Mode of the latest decode step: 0 is WaS, 1 is CaS, 2 is local.")]
    batch_threshold: Annotated[int | None, gauge("Batch size from which WaS is used.")]
    mode_switches: Annotated[int, counter("Changes of mode between two decode steps.")]
    mode_switch_reasons: Annotated[dict[str, int], About("The same, by reason.")]
    self_check: SelfCheckStatus
    was: WasStatus
    residency: ResidencyStatus
    iterations: StepsStatus
    cas: CasStatus


@dataclass(frozen=True)
class Value:
    """One value of `Status`, nested ones included."""

    path: tuple[str, ...]  # keys into the dictionary, outermost first
    about: About

    @property
    def metric(self) -> str:
        """Its name for prometheus_client, with SGLang's prefix."""
        return PREFIX + "_".join(self.path[:-1] if self.about.label else self.path)

    @property
    def series(self) -> str:
        """Its name in /metrics."""
        return self.metric + ("_total" if self.about.kind == COUNTER else "")

    @property
    def labels(self) -> dict[str, str]:
        """Beside those of SGLang's own metrics."""
        return {self.about.label: self.path[-1]} if self.about.label else {}

    def number(self, status: Mapping[str, Any]) -> float | None:
        """Of the `sidp` dictionary; None where it is not known yet."""
        value: Any = reduce(getitem, self.path, status)
        if isinstance(value, str):
            value = MODE_CODES[value]
        elif isinstance(value, list):
            value = len(value)
        return None if value is None else float(value)


def _values(part: type, *path: str) -> Iterator[Value]:
    for name, kind in get_type_hints(part, include_extras=True).items():
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _values(kind, *path, name)
        else:
            yield Value((*path, name), kind.__metadata__[0])


VALUES = tuple(_values(Status))
METRICS = tuple(value for value in VALUES if value.about.kind)
_LOGGED = tuple((value, value.about.log) for value in VALUES if value.about.log)


class LogLine:
    """SiDP's part of the decode log line: what has come since the line before."""

    def __init__(self) -> None:
        self._before: dict[Value, float] = {}

    def text(self, status: Mapping[str, Any]) -> str:
        parts = [f"sidp: {status['mode']}"]
        for value, log in _LOGGED:
            number = value.number(status) or 0.0
            moved = number - self._before.get(value, 0.0)
            self._before[value] = number
            if moved or log.is_always_there:
                parts.append(log.text.format(moved * log.scale))
        return ", ".join(parts)

"""What a simulation tells: per rank, and in all."""

from dataclasses import dataclass, field
from functools import cached_property

from bench.simulator.job import Request
from sidp_sgl.scheduler.modes.policy import CAS, WAS

PREFILL, LOCAL = "prefill", "local"  # steps beside WAS and CAS; LOCAL: a decode step without SiDP
_KINDS = (PREFILL, LOCAL, WAS, CAS)


@dataclass
class RankReport:
    """One rank; times in seconds, steps and seconds by kind of step."""

    rank: int
    steps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0.0))
    finished: int = 0
    output_tokens: int = 0
    prefill_tokens: int = 0  # those that are computed again after a retraction among them
    retractions: int = 0
    kv_capacity: int = 0  # tokens
    kv_peak: int = 0
    mode_switches: int = 0
    batch_threshold: int | None = None  # the last
    batch_seconds: float = 0.0  # running requests times seconds, of decode steps
    kv_seconds: float = 0.0  # tokens in the KV cache times seconds

    def count(self, kind: str, seconds: float, batch: int, kv_used: int) -> None:
        self.steps[kind] += 1
        self.seconds[kind] += seconds
        if kind != PREFILL:
            self.batch_seconds += batch * seconds
        self.kv_seconds += kv_used * seconds
        if kv_used > self.kv_peak:
            self.kv_peak = kv_used

    @property
    def busy_seconds(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Report:
    """The whole job. Throughput in tokens of output per second of the makespan."""

    makespan: float  # from the first arrival's clock 0 to the last token
    ranks: tuple[RankReport, ...]
    requests: tuple[Request, ...]

    @cached_property
    def output_tokens(self) -> int:
        return sum(rank.output_tokens for rank in self.ranks)

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.makespan if self.makespan else 0.0

    @property
    def mean_batch(self) -> float:
        """Running requests of a rank's decode step, on average over the time of decode steps."""
        seconds = sum(rank.busy_seconds - rank.seconds[PREFILL] for rank in self.ranks)
        return sum(rank.batch_seconds for rank in self.ranks) / seconds if seconds else 0.0

    @property
    def idle_share(self) -> float:
        """Of all ranks' time until the makespan."""
        if not self.makespan:
            return 0.0
        busy = sum(rank.busy_seconds for rank in self.ranks)
        return 1.0 - busy / (self.makespan * len(self.ranks))

    @property
    def kv_use(self) -> float:
        """Of all ranks' KV capacity, on average until the makespan."""
        capacity = self.makespan * sum(rank.kv_capacity for rank in self.ranks)
        return sum(rank.kv_seconds for rank in self.ranks) / capacity if capacity else 0.0

    @property
    def retractions(self) -> int:
        return sum(rank.retractions for rank in self.ranks)

    @property
    def mode_switches(self) -> int:
        return sum(rank.mode_switches for rank in self.ranks)

    def steps(self, kind: str) -> int:
        return sum(rank.steps[kind] for rank in self.ranks)

    @property
    def was_share(self) -> float:
        """Of SiDP's steps, prefill among them, as the engine's `iterations` count."""
        was = self.steps(WAS) + self.steps(PREFILL)
        return was / (was + self.steps(CAS)) if was else 0.0

"""What the simulated engines are set to; the same words as SGLang's flags.

Room: planner; pure.
"""

from dataclasses import dataclass

from bench.simulator.dispatch import METHODS, ROUND_ROBIN


@dataclass(frozen=True)
class Settings:
    """`ignore_eos`: every request says how long it gets, and admission reserves all of it.

    `load_balance_method` is that of a group's ranks, `group_balance_method` that of the dispatcher
    before the groups. `jitter`: standard deviation of a step's time over the time.
    """

    chunked_prefill_size: int = 8192  # tokens
    ignore_eos: bool = False
    max_running_requests: int | None = None  # of one rank; None: as SGLang limits it
    load_balance_method: str = ROUND_ROBIN
    group_balance_method: str = ROUND_ROBIN
    batch_threshold: int | None = None  # --sidp-batch-threshold; None is "auto"
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for method in (self.load_balance_method, self.group_balance_method):
            if method not in METHODS:
                raise ValueError(f"no such load balance method: {method}")
        if self.chunked_prefill_size < 1 or not 0 <= self.jitter < 1:
            raise ValueError("chunked_prefill_size is 1 or more, jitter between 0 and 1")
        if self.max_running_requests is not None and self.max_running_requests < 1:
            raise ValueError("max_running_requests is 1 or more")

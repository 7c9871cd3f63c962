"""What fetches cost."""

from dataclasses import dataclass


@dataclass
class FetchCounters:
    """What was fetched and what it cost."""

    fetches: int = 0
    bytes: int = 0
    stall_seconds: float = 0.0  # time that the compute waited for a fetch
    resyncs: int = 0  # blocks asked for out of order, e.g. after a step that was cut short
    replays: int = 0  # steps that were CUDA graphs

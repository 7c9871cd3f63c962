"""The self-check of one rank (`--sidp-self-check`): what is checked when, and what it has covered.

At start: every block of other ranks, once SGLang has made its scheduler; and a call to each owner,
once all ranks have come that far. While running: a canary.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sidp_sgl.weightpool.cas.requester import Requester
from sidp_sgl.weightpool.cas.unit import PooledUnit
from sidp_sgl.weightpool.pool import WeightPool
from sidp_sgl.weightpool.self_check.blocks import BlockCheck, Fault, raise_first
from sidp_sgl.weightpool.self_check.calls import CallCheck

logger = logging.getLogger(__name__)
CANARY_STEPS = 1000


@dataclass
class Coverage:
    """What a rank's self-check has compared. `skipped_turns`: fetches that went on without one."""

    blocks: int = 0
    bytes: int = 0
    captured_blocks: int = 0
    owners_called: int = 0
    skipped_turns: int = 0
    seconds: float = 0.0  # of the start
    canaries: int = 0


class SelfCheck:
    """`at_start`, `while_running`: what is asked for; `captures`: whether steps are CUDA graphs;
    `meet`: returns when all ranks have called it."""

    def __init__(
        self,
        pool: WeightPool,
        *,
        at_start: bool,
        while_running: bool,
        captures: bool,
        meet: Callable[[], object],
    ) -> None:
        self.coverage = Coverage()
        self.fetch_rate: float | None = None  # bytes per second; None where unknown
        self._pool = pool
        self._at_start, self._while_running = at_start, while_running
        self._captures = captures
        self._meet = meet
        self._called: tuple[Requester, list[PooledUnit]] | None = None
        self._blocks: BlockCheck | None = None
        self._calls: CallCheck | None = None
        self._steps = 0

    def add_calls(self, requester: Requester, units: list[PooledUnit]) -> None:
        """Owners are called as well, before `check_blocks`."""
        self._called = requester, units

    @torch.no_grad()
    def check_blocks(self) -> None:
        """Raises SidpError."""
        if not self._at_start:
            return
        started = time.perf_counter()
        blocks = self._blocks = BlockCheck(self._pool)
        if self._called is not None:
            self._calls = CallCheck(self._pool, *self._called)
        rank = self._pool.rank
        raise_first(self._fetch(blocks) + blocks.read_in_place(), rank)
        if self._captures and not self._pool.prefetcher.keeps_all:
            raise_first(blocks.fetch_captured(), rank)
            self.coverage.captured_blocks = len(self._pool.placement.fetched(rank))
        self.coverage.blocks, self.coverage.bytes = blocks.num_blocks, blocks.num_bytes
        self.coverage.skipped_turns = self._pool.transport.skipped_turns()
        self.coverage.seconds += time.perf_counter() - started

    def _fetch(self, blocks: BlockCheck) -> list[Fault]:
        visit = self._calls.visit if self._calls is not None else lambda block: None
        counters, started = self._pool.prefetcher.counters, time.perf_counter()
        before = counters.bytes
        faults = blocks.fetch(visit)
        if counters.bytes > before:  # not where all blocks had been fetched
            self.fetch_rate = (counters.bytes - before) / (time.perf_counter() - started)
        return faults

    @torch.no_grad()
    def check_calls(self) -> None:
        """Raises SidpError. Waits for the other ranks first: one that is starting answers late."""
        if not self._at_start:
            return
        if self._calls is not None:
            self._meet()
            started = time.perf_counter()
            self._calls.call()
            self.coverage.owners_called = self._calls.num_owners
            self.coverage.seconds += time.perf_counter() - started
            self._calls = None
        self._say()

    def _say(self) -> None:
        coverage = self.coverage
        logger.info(
            "sidp: self-check: %d blocks of %.1f MB have their owners' bytes, %d in a CUDA graph "
            "as well; %d owners computed rows; %.1f ms",
            coverage.blocks,
            coverage.bytes / 1e6,
            coverage.captured_blocks,
            coverage.owners_called,
            coverage.seconds * 1e3,
        )
        if coverage.skipped_turns:
            logger.warning(
                "sidp: self-check: %d fetches went on without their turn at an owner: fetches may "
                "be slow here",
                coverage.skipped_turns,
            )

    def before_step(self) -> None:
        """Now and then compare one of the blocks that lie in their slots; raises SidpError."""
        self._steps += 1
        is_due = self._while_running and self._steps % CANARY_STEPS == 0
        if is_due and self._blocks is not None:
            with torch.no_grad():
                raise_first(self._blocks.look(self.coverage.canaries), self._pool.rank)
            self.coverage.canaries += 1

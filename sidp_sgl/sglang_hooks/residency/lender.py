"""Elastic residency: KV memory that nobody needs holds blocks of other ranks, so that they stay.

Held and lent pages count as available, for they are back before SGLang's allocator would miss them:
no request waits for a block's sake, and no cached prefix goes that was used of late.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.utils import get_num_new_pages

from sidp_sgl.sglang_hooks.required import Hook
from sidp_sgl.sglang_hooks.residency.kv_memory import KvMemory
from sidp_sgl.sglang_hooks.residency.recent import RecentTokens
from sidp_sgl.sglang_hooks.step.rank_steps import being_prefilled
from sidp_sgl.weightpool.pool import WeightPool

COLD_SECONDS = 5.0  # a cached prefix that was not used for so long gives way to a block
_TICK_SECONDS = 0.01
_GROWTH_TOKENS = 64  # of every running request, before it would need what is lent
_FETCHES = 2  # under way at once: steps' fetches, and whoever needs the memory, wait behind them
_ALLOCATORS = "sglang.srt.mem_cache.allocator"


@dataclass
class Lent:
    """`blocks` of the `needed` ones stay now, in KV memory of `tokens`; `kept` and `dropped` count
    since the start."""

    blocks: int = 0
    needed: int = 0
    tokens: int = 0
    kept: int = 0
    dropped: int = 0


class KvLender:
    """Of one rank. `evicts`: whether cold prefixes may go, which the cache must give in the order
    of their last use; TP ranks' caches must stay alike."""

    def __init__(self, pool: WeightPool, *, evicts: bool) -> None:
        self.is_on = True
        self._pool = pool
        self._evicts = evicts
        self._kv = KvMemory(pool)
        self._blocks: dict[int, int] = {}  # segment → block
        self._kept = self._dropped = 0
        self._recent = RecentTokens(COLD_SECONDS)
        self._running: dict[str, int] = {}  # request → tokens
        self._next_tick = 0.0

    def hooks(self) -> list[Hook]:
        token = f"{_ALLOCATORS}.token.TokenToKVPoolAllocator"
        paged = f"{_ALLOCATORS}.paged.PagedTokenToKVPoolAllocator"
        base = f"{_ALLOCATORS}.base.BaseTokenToKVPoolAllocator"
        return [
            *self._kv.hooks(),
            *(
                Hook(f"{kind}.{name}", hook, HookType.AROUND)
                for kind in (token, paged)
                for name, hook in (
                    ("alloc", self._alloc),
                    ("available_size", self._available_size),
                    ("clear", self._clear),
                )
            ),
            Hook(f"{paged}.alloc_extend", self._alloc_extend, HookType.AROUND),
            Hook(f"{paged}.alloc_decode", self._alloc_decode, HookType.AROUND),
            Hook(f"{paged}.get_all_free_pages", self._free_pages, HookType.AFTER),
            Hook(f"{base}.get_all_free_pages", self._free_pages, HookType.AFTER),
        ]

    @property
    def lent(self) -> Lent:
        segments, kv_pool = self._kv.segments, self._kv.kv_pool
        blocks = len(self._blocks)
        tokens = blocks * segments.pages_each * kv_pool.page_size if blocks else 0
        needed = len(self._pool.prefetcher.order)
        return Lent(blocks, needed, tokens, self._kept, self._dropped)

    # In SGLang's allocator.

    def _alloc(self, original: Any, allocator: Any, need_size: int) -> Any:
        self._make_room(allocator, need_size // allocator.page_size)
        return original(allocator, need_size)

    def _alloc_extend(
        self,
        original: Any,
        allocator: Any,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        pages = get_num_new_pages(seq_lens_cpu, allocator.page_size, prefix_lens_cpu)
        self._make_room(allocator, int(pages))
        lengths = prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu
        return original(allocator, *lengths, *args, **kwargs)

    def _alloc_decode(
        self,
        original: Any,
        allocator: Any,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        pages = get_num_new_pages(seq_lens_cpu, allocator.page_size, decode=True)
        self._make_room(allocator, int(pages))
        return original(allocator, seq_lens, seq_lens_cpu, *args, **kwargs)

    def _available_size(self, original: Any, allocator: Any) -> int:
        held = self._kv.segments.num_held if self._lends(allocator) else 0
        return original(allocator) + held * allocator.page_size

    def _free_pages(self, pages: torch.Tensor | None, allocator: Any) -> torch.Tensor | None:
        if pages is None or not self._lends(allocator):
            return pages
        return torch.cat((pages, torch.from_numpy(self._kv.segments.pages()).to(pages)))

    def _clear(self, original: Any, allocator: Any) -> None:
        """No token is left; blocks stay."""
        original(allocator)
        if self._lends(allocator):
            self._take_out(allocator, self._kv.segments.has(allocator.free_pages.cpu().numpy()))

    def _lends(self, allocator: Any) -> bool:
        """Whether it allocates what is lent here."""
        return allocator.get_kvcache() is self._kv.kv_pool

    def _make_room(self, allocator: Any, num_pages: int) -> None:
        """Let so many pages be in the allocator's list, if there are any."""
        missing = num_pages - len(allocator.free_pages)
        if missing > 0 and self._lends(allocator):
            self._give_back(allocator, missing)

    def _give_back(self, allocator: Any, num_pages: int) -> None:
        given = self._kv.segments.give_back(num_pages)
        for segment in given.segments:
            self._pool.drop(self._blocks.pop(segment))
        self._dropped += len(given.segments)
        pages = torch.from_numpy(given.pages).to(allocator.free_pages)
        allocator.free_pages = torch.cat((allocator.free_pages, pages))

    # Between two steps.

    def turn(self, *, on: bool, scheduler: Any) -> None:
        """From now on; off gives all of it back."""
        self.is_on = on
        allocator = scheduler.token_to_kv_pool_allocator
        if not on and self._lends(allocator):
            self._give_back(allocator, self._kv.segments.num_held)

    def saw_prefill(self, batch: Any) -> None:
        """A prefill uses the prefixes that it finds, and leaves its tokens in the cache."""
        self._recent.use(time.monotonic(), int(batch.seq_lens_cpu.sum()))

    def tick(self, scheduler: Any) -> None:
        """Lend, where memory is spare: now and then, and not while a request waits."""
        now, allocator = time.monotonic(), scheduler.token_to_kv_pool_allocator
        if now < self._next_tick or not self.is_on or not self._lends(allocator):
            return
        self._next_tick = now + _TICK_SECONDS
        running = [req for req in scheduler.running_batch.reqs if not req.finished()]
        self._see_ends(running, now)
        is_pressed = scheduler.waiting_queue or scheduler.chunked_req is not None
        if is_pressed or not self._kv.segments.count or not self._pool.passing():
            return
        growth = max(_GROWTH_TOKENS, allocator.page_size)
        reserved = growth * (len(running) + being_prefilled(scheduler))
        if self._kv.segments.whole() is None and self._spare(allocator, reserved) >= 0:
            self._hold(allocator)
        while self._may_lend(allocator, reserved):
            self._lend()
        self._make_cold_room(scheduler, reserved, now)

    def _spare(self, allocator: Any, reserved: int) -> int:
        """Tokens that nobody needs beyond one more segment; may be below 0."""
        segments = self._kv.segments
        lent = (segments.num_lent + 1) * segments.pages_each * allocator.page_size
        return allocator.available_size() - lent - reserved

    def _may_lend(self, allocator: Any, reserved: int) -> bool:
        return (
            self._pool.prefetcher.residents.num_fetching < _FETCHES
            and bool(self._pool.passing())
            and self._kv.segments.whole() is not None
            and self._spare(allocator, reserved) >= 0
        )

    def _lend(self) -> None:
        """Let one more block stay: of those that the next step needs last, for the first may lie in
        their slots."""
        segment, block = self._kv.segments.whole(), self._pool.passing()[-1]
        assert segment is not None
        self._kv.segments.lend(segment)
        self._blocks[segment] = block
        self._kept += 1
        self._pool.keep(block, self._kv.memory[segment])

    def _make_cold_room(self, scheduler: Any, reserved: int, now: float) -> None:
        """Let prefixes go that were not used of late, where a segment could be had for them."""
        segments, allocator = self._kv.segments, scheduler.token_to_kv_pool_allocator
        if not self._evicts or segments.whole() is not None or not self._pool.passing():
            return
        cold = scheduler.tree_cache.evictable_size() - self._recent.total(now)
        if cold > 0 and self._spare(allocator, reserved) + cold >= 0:
            num_tokens = min(cold, segments.pages_each * allocator.page_size)
            scheduler.tree_cache.evict(EvictParams(num_tokens=num_tokens))

    def _see_ends(self, running: list[Any], now: float) -> None:
        """What a request has computed stays in the cache when it ends."""
        lengths = {req.rid: len(req.origin_input_ids) + len(req.output_ids) for req in running}
        self._recent.use(now, sum(n for rid, n in self._running.items() if rid not in lengths))
        self._running = lengths

    def _hold(self, allocator: Any) -> None:
        """Take pages that may be lent out of the allocator's list."""
        if bool((allocator.free_pages >= self._kv.segments.first_page).any()):
            self._take_out(allocator, self._kv.segments.hold(allocator.free_pages.cpu().numpy()))

    def _take_out(self, allocator: Any, is_ours: np.ndarray) -> None:
        if is_ours.any():
            free = allocator.free_pages
            allocator.free_pages = free[~torch.from_numpy(is_ours).to(free.device)]

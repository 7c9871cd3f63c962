"""Elastic residency: KV memory that nobody needs holds blocks of other ranks, so that they stay.

Held and lent pages count as available, for they are back before SGLang's allocator would miss them:
no request waits, and no cached prefix goes, for a block's sake. Only prefixes that were not used
for a while give way to one.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks.required import Hook
from sidp_sgl.sglang_hooks.residency.kv_memory import KvMemory
from sidp_sgl.sglang_hooks.residency.recent import RecentTokens
from sidp_sgl.weightpool.pool import WeightPool

COLD_SECONDS = 5.0  # a cached prefix that was not used for so long gives way to a block
_TICK_SECONDS = 0.01
_GROWTH_TOKENS = 64  # of every running request, before it would need what is lent
_FETCHED_AT_ONCE = 8  # one in so many blocks, while a step may wait for other fetches
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
    """Of one rank. `evicts`: whether cold prefixes may go; TP ranks' caches must stay alike."""

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
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        most = extend_num_tokens // allocator.page_size + len(prefix_lens) + 1
        self._make_room(allocator, most)
        lengths = prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu
        return original(allocator, *lengths, last_loc, extend_num_tokens, *args, **kwargs)

    def _alloc_decode(
        self, original: Any, allocator: Any, seq_lens: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        self._make_room(allocator, len(seq_lens))
        return original(allocator, seq_lens, *args, **kwargs)

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
        if not on:
            self._give_back(scheduler.token_to_kv_pool_allocator, self._kv.segments.num_held)

    def saw_prefill(self, batch: Any) -> None:
        """A prefill uses the prefixes that it finds, and leaves its tokens in the cache."""
        self._recent.use(time.monotonic(), int(batch.seq_lens_cpu.sum()))

    def tick(self, scheduler: Any) -> None:
        """Lend, where memory is spare: now and then, and not while a request waits."""
        now = time.monotonic()
        if now < self._next_tick or not self.is_on or not self._kv.segments.count:
            return
        self._next_tick = now + _TICK_SECONDS
        self._see_ends(scheduler, now)
        is_pressed = scheduler.waiting_queue or scheduler.chunked_req is not None
        while not is_pressed and self._may_fetch(scheduler) and self._lend(scheduler, now):
            pass

    def _lend(self, scheduler: Any, now: float) -> bool:
        """Let one more block stay; whether it does."""
        missing, segments = self._pool.passing(), self._kv.segments
        if not missing:
            return False
        allocator, running = scheduler.token_to_kv_pool_allocator, scheduler.running_batch.reqs
        wanted = segments.pages_each * allocator.page_size
        spare = allocator.available_size() - segments.num_lent * wanted
        spare -= _GROWTH_TOKENS * len(running)
        cold = max(0, scheduler.tree_cache.evictable_size() - self._recent.total(now))
        if spare >= wanted:
            self._hold(allocator)
            if (segment := segments.whole()) is not None:
                segments.lend(segment)
                self._blocks[segment] = missing[0]
                self._kept += 1
                self._pool.keep(missing[0], self._kv.memory[segment])
                return True
        if self._evicts and cold and spare + cold >= wanted:
            scheduler.tree_cache.evict(EvictParams(num_tokens=min(cold, wanted)))
        return False

    def _see_ends(self, scheduler: Any, now: float) -> None:
        """What a request has computed stays in the cache when it ends."""
        running = {
            req.rid: len(req.origin_input_ids) + len(req.output_ids)
            for req in scheduler.running_batch.reqs
        }
        self._recent.use(now, sum(n for rid, n in self._running.items() if rid not in running))
        self._running = running

    def _may_fetch(self, scheduler: Any) -> bool:
        """Fetches of steps wait behind these."""
        prefetcher, is_idle = self._pool.prefetcher, not scheduler.running_batch.reqs
        most = len(prefetcher.order) if is_idle else len(prefetcher.order) // _FETCHED_AT_ONCE
        return prefetcher.residents.num_fetching < max(1, most)

    def _hold(self, allocator: Any) -> None:
        """Take pages that may be lent out of the allocator's list."""
        self._take_out(allocator, self._kv.segments.hold(allocator.free_pages.cpu().numpy()))

    def _take_out(self, allocator: Any, is_ours: np.ndarray) -> None:
        if is_ours.any():
            free = allocator.free_pages
            allocator.free_pages = free[~torch.from_numpy(is_ours).to(free.device)]

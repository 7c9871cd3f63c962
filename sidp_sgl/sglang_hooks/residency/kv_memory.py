"""SGLang's KV buffers in memory whose tail has a second address: segments, each long enough for a
block.

A segment is a run of tokens: their rows in every buffer, side by side. All addresses are fixed from
the start, so lending needs no call of the driver.
"""

from math import gcd, lcm
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks.required import Hook
from sidp_sgl.sglang_hooks.residency.segments import NO_SEGMENTS, Segments
from sidp_sgl.weightpool.alignment import align
from sidp_sgl.weightpool.pool import WeightPool

_POOLS = "sglang.srt.mem_cache.memory_pool"


class KvMemory:
    """`segments` are none where nothing can be lent; `memory`: of each, [num_bytes] uint8."""

    def __init__(self, pool: WeightPool) -> None:
        self.segments = NO_SEGMENTS
        self.memory: list[torch.Tensor] = []
        self.kv_pool: Any = None
        self._pool = pool

    def hooks(self) -> list[Hook]:
        mha, mla = f"{_POOLS}.MHATokenToKVPool", f"{_POOLS}.MLATokenToKVPool"
        return [
            Hook(f"{mha}._create_buffers_normal", self._create, HookType.AROUND),
            Hook(f"{mla}._create_buffers", self._create, HookType.AROUND),
        ]

    def _create(self, original: Any, kv_pool: Any) -> None:
        if self.kv_pool is not None:  # a model with several kinds of attention
            self.segments = NO_SEGMENTS
            original(kv_pool)
            return
        self.kv_pool, device = kv_pool, kv_pool.device
        kv_pool.device = "meta"
        try:
            original(kv_pool)
        finally:
            kv_pool.device = device
        is_mla = hasattr(kv_pool, "kv_buffer")
        lists = [kv_pool.kv_buffer] if is_mla else [kv_pool.k_buffer, kv_pool.v_buffer]
        # Keys and values of a layer side by side, as SGLang has them.
        buffers = [buffer for layer in zip(*lists, strict=True) for buffer in layer]
        is_by_token = getattr(kv_pool, "kv_cache_layout", "nhd") == "nhd"
        moved = self._moved(kv_pool, buffers) if is_by_token else None
        if moved is None:
            original(kv_pool)
            return
        for number, each in enumerate(lists):
            each[:] = moved[number :: len(lists)]

    def _moved(self, kv_pool: Any, buffers: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """`buffers` [rows of tokens, …] in memory of ours; None where nothing can be lent."""
        transport, placement, rank = self._pool.transport, self._pool.placement, self._pool.rank
        page_bytes = transport.page_bytes
        assert page_bytes is not None
        rows, row_bytes = len(buffers[0]), [b[0].numel() * b.element_size() for b in buffers]
        # So many tokens fill whole pages of the device in every buffer, and of the allocator.
        step = lcm(kv_pool.page_size, *(page_bytes // gcd(page_bytes, size) for size in row_bytes))
        padded = align(rows, step)
        tokens = align(-(-placement.slot_bytes(rank) // sum(row_bytes)), step)
        end = rows // step * step
        count = min(len(self._pool.passing()), (end - kv_pool.page_size) // tokens)
        if count <= 0 or self._pool.placement.keeps_all(rank):
            return None
        first = end - count * tokens
        offsets = [padded * sum(row_bytes[:index]) for index in range(len(buffers))]
        ranges = [
            [
                (offset + start * size, tokens * size)
                for offset, size in zip(offsets, row_bytes, strict=True)
            ]
            for start in range(first, end, tokens)
        ]
        memory, self.memory = transport.aliased(padded * sum(row_bytes), ranges)
        page = kv_pool.page_size
        self.segments = Segments(first // page, tokens // page, count)
        return [
            memory[offset : offset + rows * size].view(buffer.dtype).view(buffer.shape)
            for buffer, offset, size in zip(buffers, offsets, row_bytes, strict=True)
        ]

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
from sidp_sgl.sglang_hooks.residency.segments import Segments
from sidp_sgl.weightpool.alignment import align
from sidp_sgl.weightpool.pool import WeightPool

_POOLS = "sglang.srt.mem_cache.memory_pool"


class KvMemory:
    """`segments` is None where nothing can be lent; `memory`: of each, [num_bytes] uint8."""

    def __init__(self, pool: WeightPool) -> None:
        self.segments: Segments | None = None
        self.memory: list[torch.Tensor] = []
        self.kv_pool: Any = None
        self._pool = pool

    def hooks(self) -> list[Hook]:
        return [
            Hook(f"{_POOLS}.MHATokenToKVPool._create_buffers_normal", self._mha, HookType.AFTER),
            Hook(f"{_POOLS}.MLATokenToKVPool._create_buffers", self._mla, HookType.AFTER),
        ]

    def _mha(self, _: None, kv_pool: Any) -> None:
        buffers = [b for pair in zip(kv_pool.k_buffer, kv_pool.v_buffer, strict=True) for b in pair]
        if kv_pool.kv_cache_layout == "nhd":
            buffers = self._move(kv_pool, buffers)
            kv_pool.k_buffer, kv_pool.v_buffer = buffers[::2], buffers[1::2]

    def _mla(self, _: None, kv_pool: Any) -> None:
        kv_pool.kv_buffer = self._move(kv_pool, kv_pool.kv_buffer)

    def _move(self, kv_pool: Any, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
        """The same buffers, [rows of tokens, …] each, in memory of ours."""
        if self.kv_pool is not None:  # of a model with several kinds of attention
            self.segments = None
            return buffers
        self.kv_pool = kv_pool
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
            return buffers
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

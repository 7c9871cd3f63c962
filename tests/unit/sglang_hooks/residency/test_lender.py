"""Blocks in the memory of SGLang's own KV buffers and allocators, in any order of events: a token
and a block never use the same memory, and no request finds less room for a block's sake."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.plugins.hook_registry import HookType

from sidp_sgl.sglang_hooks.required import Hook
from sidp_sgl.sglang_hooks.residency import lender as lender_module
from sidp_sgl.sglang_hooks.residency.lender import COLD_SECONDS, KvLender
from sidp_sgl.weightpool.transport.shm.transport import ShmTransport

NUM_BLOCKS, BLOCK_BYTES, SIZE = 4, 70_000, 1500
NEVER = 2.0 * COLD_SECONDS


class FakePool:
    """Stands for the weight pool: blocks are bytes of one value each."""

    def __init__(self, transport: ShmTransport) -> None:
        self.transport, self.rank = transport, 0
        self.placement = SimpleNamespace(slot_bytes=lambda _: BLOCK_BYTES, keeps_all=lambda _: 0)
        residents = SimpleNamespace(num_fetching=0)
        self.prefetcher = SimpleNamespace(order=range(NUM_BLOCKS), residents=residents)
        self.kept: dict[int, torch.Tensor] = {}
        self.on_keep: Callable[[], object] = lambda: None

    def passing(self) -> list[int]:
        return [block for block in range(NUM_BLOCKS) if block not in self.kept]

    def keep(self, block: int, memory: torch.Tensor) -> None:
        assert memory.numel() >= BLOCK_BYTES
        self.kept[block] = memory[:BLOCK_BYTES]
        self.kept[block].fill_(200 + block)
        self.on_keep()

    def check(self) -> None:
        for block, memory in self.kept.items():
            assert (memory == 200 + block).all(), "tokens have written into a block"

    def drop(self, block: int) -> None:
        self.check()
        del self.kept[block]


class FakeCache:
    """Stands for the radix cache: the oldest go first."""

    def __init__(self) -> None:
        self.allocator: Any = None
        self.cached: list[torch.Tensor] = []
        self.evicted = 0

    def evictable_size(self) -> int:
        return sum(map(len, self.cached))

    def evict(self, params: Any) -> None:
        evicted = 0
        while evicted < params.num_tokens and self.cached:
            evicted += len(self.cached[0])
            self.allocator.free(self.cached.pop(0))
        self.evicted += evicted


@contextmanager
def applied(hooks: list[Hook]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for target, function, kind in hooks:
            path, name = target.rsplit(".", 1)
            module, cls = path.rsplit(".", 1)
            owner = getattr(importlib.import_module(module), cls)
            patch.setattr(owner, name, _hooked(getattr(owner, name), function, kind))
        yield


def _hooked(original: Any, function: Any, kind: HookType) -> Any:
    def around(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    def after(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        changed = function(result, *args, **kwargs)
        return result if changed is None else changed

    return around if kind is HookType.AROUND else after


class Machine:
    """A scheduler's memory, with requests that write what they are given."""

    def __init__(self, page_size: int, is_mla: bool = False) -> None:
        self.transport = ShmTransport()
        self.pool = FakePool(self.transport)
        self.lender = KvLender(self.pool, evicts=True)  # type: ignore[arg-type]
        self.page_size, self.is_mla = page_size, is_mla
        self.cache = FakeCache()
        self.requests: list[tuple[torch.Tensor, int]] = []  # token places, value
        self.number = 0

    def start(self) -> None:
        common: dict[str, Any] = {"layer_num": 3, "device": "cpu", "enable_memory_saver": False}
        size, page, kind = SIZE // self.page_size * self.page_size, self.page_size, torch.bfloat16
        if self.is_mla:
            kv = MLATokenToKVPool(size, page, kind, kv_lora_rank=64, qk_rope_head_dim=32, **common)
            self.buffers = kv.kv_buffer
        else:
            kv = MHATokenToKVPool(size, page, kind, head_num=2, head_dim=16, **common)
            self.buffers = [*kv.k_buffer, *kv.v_buffer]
            assert kv.k_data_ptrs.tolist() == [buffer.data_ptr() for buffer in kv.k_buffer]
            for keys, values in zip(kv.k_buffer, kv.v_buffer, strict=True):
                assert (values.data_ptr() - keys.data_ptr()) % (page * keys[0].nbytes) == 0
        assert not any(buffer.any() or buffer.is_meta for buffer in self.buffers)
        allocator = TokenToKVPoolAllocator if page == 1 else PagedTokenToKVPoolAllocator
        sizes = (size,) if page == 1 else (size, page)
        self.allocator = allocator(*sizes, torch.int64, "cpu", kv, need_sort=False)
        self.size = self.cache.allocator = self.allocator
        self.size = size
        self.scheduler = SimpleNamespace(
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.cache,
            waiting_queue=[],
            chunked_req=None,
            last_batch=None,
            running_batch=SimpleNamespace(reqs=[]),
        )

    def admit(self, num_tokens: int) -> bool:
        num_tokens = num_tokens // self.page_size * self.page_size
        places = self.allocator.alloc(num_tokens) if num_tokens else None
        if places is None:
            return False
        self.number += 1
        value = self.number % 200
        for buffer in self.buffers:
            buffer.view(torch.uint8)[places] = value
        self.requests.append((places, value))
        return True

    def check(self) -> None:
        self.pool.check()
        for places, value in self.requests:
            for buffer in self.buffers:
                assert (buffer.view(torch.uint8)[places] == value).all()
        used = sum(len(p) for p, _ in self.requests) + self.cache.evictable_size()
        assert self.allocator.available_size() == self.size - used
        free = self.allocator.get_all_free_pages().tolist()
        assert len(free) == len(set(free)) == self.allocator.available_size() // self.page_size

    def end(self, index: int, *, stays: bool) -> None:
        if self.requests:
            places, _ = self.requests.pop(index % len(self.requests))
            if stays:
                self.cache.cached.append(places)
            else:
                self.allocator.free(places)

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.lender._next_tick = 0.0
            self.lender.tick(self.scheduler)


@contextmanager
def machine(page_size: int = 1, is_mla: bool = False) -> Iterator[Machine]:
    made = Machine(page_size, is_mla)
    with applied(made.lender.hooks()):
        made.start()
        yield made
    made.transport.close()


STEPS = st.tuples(
    st.sampled_from(["admit", "end", "cache", "tick", "evict", "off", "flush", "wait"]),
    st.integers(0, 900),
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 16]), st.booleans(), st.lists(STEPS, max_size=40))
def test_tokens_and_blocks_never_meet(
    page_size: int, is_mla: bool, steps: list[tuple[str, int]]
) -> None:
    with machine(page_size, is_mla) as rank:
        for what, number in steps:
            if what == "admit":
                room = rank.allocator.available_size()
                wanted = number // page_size * page_size
                assert rank.admit(number) == (0 < wanted <= room), "blocks take no room"
            elif what in ("end", "cache"):
                rank.end(number, stays=what == "cache")
            elif what == "evict":
                rank.cache.evict(SimpleNamespace(num_tokens=number))
            elif what == "off":
                rank.lender.turn(on=number % 2 == 0, scheduler=rank.scheduler)
            elif what == "flush" and not rank.requests:
                rank.cache.cached.clear()
                rank.allocator.clear()
            else:
                rank.scheduler.waiting_queue = ["one"] if what == "wait" and number % 2 else []
                rank.tick(1 + number % 8)
            rank.check()


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("is_mla", [False, True])
def test_an_idle_rank_keeps_all_blocks_and_gives_them_back(page_size: int, is_mla: bool) -> None:
    with machine(page_size, is_mla) as rank:
        rank.tick(NUM_BLOCKS)
        assert sorted(rank.pool.kept) == list(range(NUM_BLOCKS))
        lent = rank.lender.lent
        assert (lent.blocks, lent.kept, lent.dropped) == (NUM_BLOCKS, NUM_BLOCKS, 0)
        assert 0 < lent.tokens < rank.size
        assert rank.admit(rank.size), "all of the memory, at once"
        rank.check()
        assert rank.pool.kept == {} and rank.lender.lent.dropped == NUM_BLOCKS
        rank.tick(9)
        assert rank.pool.kept == {}
        rank.end(0, stays=False)
        rank.tick(NUM_BLOCKS)
        rank.check()
        assert len(rank.pool.kept) == NUM_BLOCKS


def request(rid: str, num_tokens: int, *, is_finished: bool = False) -> Any:
    return SimpleNamespace(
        rid=rid, origin_input_ids=[0] * num_tokens, output_ids=[], finished=lambda: is_finished
    )


def test_memory_that_running_requests_will_soon_need_is_not_lent() -> None:
    with machine() as rank:
        rank.admit(600)
        running = rank.scheduler.running_batch.reqs
        running.extend(request(str(n), 10) for n in range(12))
        rank.tick(9)
        assert len(rank.pool.kept) == 0
        del running[1:]
        rank.tick(9)
        assert len(rank.pool.kept) > 0


def test_nothing_is_lent_while_a_request_waits() -> None:
    with machine() as rank:
        rank.scheduler.waiting_queue = ["one"]
        rank.tick(9)
        assert rank.pool.kept == {}


def test_prefixes_give_way_when_they_have_been_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(lender_module.time, "monotonic", lambda: now[0])
    with machine() as rank:
        rank.admit(1400)
        rank.lender.saw_prefill(SimpleNamespace(seq_lens_cpu=torch.tensor([1400])))
        rank.end(0, stays=True)
        rank.tick(9)
        assert rank.cache.evicted == 0 and rank.pool.kept == {}
        now[0] += NEVER
        rank.tick(30)
        assert rank.cache.evicted and len(rank.pool.kept) == NUM_BLOCKS
        rank.check()


def test_what_a_request_leaves_is_not_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang still counts it as running when it has ended."""
    now = [100.0]
    monkeypatch.setattr(lender_module.time, "monotonic", lambda: now[0])
    with machine() as rank:
        rank.admit(1400)
        rank.scheduler.running_batch.reqs = [request("long", 1400)]
        rank.tick()
        now[0] += NEVER
        rank.tick()
        rank.scheduler.running_batch.reqs = [request("long", 1400, is_finished=True)]
        rank.end(0, stays=True)
        rank.tick(9)
        assert rank.cache.evicted == 0
        now[0] += NEVER
        rank.tick(9)
        assert rank.cache.evicted > 0


def test_few_fetches_are_under_way_at_once() -> None:
    with machine() as rank:
        residents = rank.pool.prefetcher.residents
        rank.pool.on_keep = lambda: setattr(residents, "num_fetching", residents.num_fetching + 1)
        rank.tick(9)
        assert sorted(rank.pool.kept) == [NUM_BLOCKS - 2, NUM_BLOCKS - 1], "the last ones first"
        residents.num_fetching = 0
        rank.tick(9)
        assert len(rank.pool.kept) == NUM_BLOCKS


def test_an_allocator_of_a_wrapped_cache_is_left_alone() -> None:
    with machine() as rank:
        rank.allocator._kvcache = SimpleNamespace(full=rank.allocator.get_kvcache())
        rank.tick(9)
        assert rank.pool.kept == {} and rank.admit(rank.size)


def test_an_allocator_of_another_cache_is_left_alone() -> None:
    """Of a model with two kinds of attention."""
    with machine() as rank:
        MHATokenToKVPool(
            64, 1, torch.bfloat16, head_num=2, head_dim=16, layer_num=1, device="cpu",
            enable_memory_saver=False,
        )  # fmt: skip
        rank.tick(9)
        assert rank.pool.kept == {} and rank.lender.lent.tokens == 0
        assert rank.admit(rank.size)


def test_blocks_stay_when_the_cache_is_flushed() -> None:
    with machine() as rank:
        rank.tick(NUM_BLOCKS)
        rank.allocator.clear()
        rank.check()
        assert len(rank.pool.kept) == NUM_BLOCKS
        assert rank.admit(rank.size)

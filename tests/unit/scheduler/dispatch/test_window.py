"""The controller's window: every request once, shared prefixes together, long outputs first."""

import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.scheduler.dispatch.prompts import KEY_TOKENS, RecentPrompts, prompt_key, shared_tokens
from sidp_sgl.scheduler.dispatch.window import Queued, Window

tokens = st.lists(st.integers(0, 3), max_size=8)


def request(number: int, prompt: Sequence[int], output: int = 10) -> Queued:
    return Queued(number, prompt_key(prompt), len(prompt), output, None)


@given(tokens, tokens)
def test_keys_sort_as_tokens_do_and_share_what_they_share(one: list[int], other: list[int]) -> None:
    keys = prompt_key(one), prompt_key(other)
    assert (keys[0] < keys[1]) == (one < other)
    shared = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    assert shared_tokens(*keys) == (min(len(one), len(other)) if shared is None else shared)


def test_long_prompts_that_agree_so_far_count_as_the_same() -> None:
    assert prompt_key(range(KEY_TOKENS + 1)) == prompt_key(range(KEY_TOKENS + 9))


@given(st.lists(tokens, max_size=12), tokens, st.integers(0, 40))
def test_recent_prompts_know_the_longest_prefix(
    prompts: list[list[int]], prompt: list[int], capacity: int
) -> None:
    recent = RecentPrompts()
    recent.capacity_tokens = capacity
    kept: list[list[int]] = []
    for each in prompts:
        recent.add(prompt_key(each))
        kept.append(each)
        while len(kept) > 1 and sum(map(len, kept)) > capacity:
            kept.pop(0)
    key = prompt_key(prompt)
    longest = max((shared_tokens(key, prompt_key(each)) for each in kept), default=0)
    assert recent.shared_tokens(key) == longest


@given(st.lists(st.tuples(tokens, st.integers(0, 9)), max_size=30), st.data())
def test_every_request_is_picked_once(
    prompts: list[tuple[list[int], int]], data: st.DataObject
) -> None:
    window, added, picked = Window(), [], []
    cursors: list[bytes | None] = [None] * 3
    waiting = [request(n, prompt, output) for n, (prompt, output) in enumerate(prompts)]
    while waiting or len(window):
        if waiting and (not len(window) or data.draw(st.booleans())):
            added.append(waiting.pop(0))
            window.add(added[-1])
            continue
        rank = data.draw(st.integers(0, 2))
        others = [p for n, p in enumerate(cursors) if n != rank and p is not None]
        longest = max(each.output_tokens.bit_length() for each in window)
        chosen = window.pick(cursors[rank], others)
        assert chosen.output_tokens.bit_length() == longest, "long outputs first"
        picked.append(chosen)
        cursors[rank] = chosen.prompt
    assert sorted(each.number for each in picked) == sorted(each.number for each in added)


def test_shared_prefixes_stay_together() -> None:
    """Eight headers, four ranks: each header is computed by little more than one of them."""
    random_ = random.Random(0)
    headers = [[header] * random_.randrange(20, 80) for header in range(8)]
    prompts = [headers[n % 8] + [100 + n] for n in range(800)]
    window = Window()
    for number, prompt in enumerate(prompts):
        window.add(request(number, prompt))
    cursors: list[bytes | None] = [None] * 4
    seen: list[set[int]] = [set() for _ in cursors]
    while len(window):
        rank = random_.randrange(4)
        others = [p for n, p in enumerate(cursors) if n != rank and p is not None]
        chosen = window.pick(cursors[rank], others)
        cursors[rank] = chosen.prompt
        seen[rank].add(chosen.number % 8)
    assert sum(map(len, seen)) <= 8 + 2 * 4, "each rank splits a header or two at its ends"
    assert all(len(each) >= 2 for each in seen)


def test_nobody_waits_for_ever() -> None:
    """A short request among ever more long ones."""
    window = Window()
    window.add(request(0, [1, 2, 3], output=1))
    for number in range(1, 5000):
        window.add(request(number, [7, number], output=1000))
        if window.pick(prompt_key([7]), []).number == 0:
            return
    raise AssertionError("passed over for ever")

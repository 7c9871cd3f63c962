"""The controller's window: every request once, shared prefixes together; in a job long outputs
first, on a server in about the order of arrival."""

import random
from collections.abc import Sequence

import pytest
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
    window, added, picked = Window(is_job=True), [], []
    window.running = len(prompts)
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


@pytest.mark.parametrize(
    ("is_job", "most_seen", "most_changes"), [(True, 8 + 2 * 4, 0.03), (False, 8 * 4, 0.3)]
)
def test_shared_prefixes_stay_together(is_job: bool, most_seen: int, most_changes: float) -> None:
    """Eight headers, four ranks: in a job each splits a header or two at its ends. On a server
    they meet all headers, but seven of eight prompts would bring another one in any order."""
    random_ = random.Random(0)
    headers = [[header] * random_.randrange(20, 80) for header in range(8)]
    prompts = [headers[n % 8] + [100 + n] for n in range(800)]
    window = Window(is_job)
    window.running = 64
    for number, prompt in enumerate(prompts):
        window.add(request(number, prompt))
    cursors: list[bytes | None] = [None] * 4
    seen: list[set[int]] = [set() for _ in cursors]
    changes = 0
    while len(window):
        rank = random_.randrange(4)
        others = [p for n, p in enumerate(cursors) if n != rank and p is not None]
        chosen = window.pick(cursors[rank], others)
        changes += cursors[rank] is None or cursors[rank][:4] != chosen.prompt[:4]
        cursors[rank] = chosen.prompt
        seen[rank].add(chosen.number % 8)
    assert sum(map(len, seen)) <= most_seen and changes <= most_changes * len(prompts)
    assert all(len(each) >= 2 for each in seen)


def passed(is_job: bool, running: int, window: Window) -> int:
    """How many that come later are picked before a short request."""
    window.running = running
    window.add(request(0, [1, 2, 3], output=1))
    for number in range(1, 5000):
        window.add(request(number, [7, number], output=1000))
        if window.pick(prompt_key([7]), []).number == 0:
            return number - 1
    raise AssertionError("passed over for ever")


def test_a_short_request_among_ever_more_long_ones_is_passed_over_by_few() -> None:
    assert passed(True, 40, Window(is_job=True)) == 4 * 40
    assert passed(False, 40, Window(is_job=False)) == 40 // 2 - 1


steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "pick", "pick", "oldest", "abort"]),
        tokens,
        st.integers(0, 9),  # output
        st.integers(0, 12),  # running
    ),
    max_size=60,
)


@given(st.booleans(), steps)
def test_whatever_comes_nobody_is_overtaken_by_more_than_the_bound(
    is_job: bool, drawn: list[tuple[str, list[int], int, int]]
) -> None:
    """`running` moves as it likes; the rest is picked at the end."""
    window = Window(is_job)
    overtaken: dict[int, int] = {}  # of those that wait: by how many that came later
    most_running = most_waiting = 0
    for number, (what, prompt, output, running) in enumerate([*drawn, *[("pick", [], 0, 0)] * 60]):
        window.running = running
        most_running = max(most_running, running)
        if what == "add":
            window.add(request(number, prompt, output))
            overtaken[number] = 0
        elif len(window):
            cursor = prompt_key(prompt)
            if what == "pick":
                taken = window.pick(cursor, [cursor[:4]] if output else []).number
            else:
                waits = window.oldest() if what == "oldest" else [*window][-1]
                taken = window.remove(waits.number).number
            del overtaken[taken]
            if what != "abort":
                for earlier in [other for other in overtaken if other < taken]:
                    overtaken[earlier] += 1
        most_waiting = max(most_waiting, len(window))
        bound = 5 * max(most_running, most_waiting) if is_job else max(0, most_running // 2 - 1)
        assert all(count <= bound for count in overtaken.values())
    assert not len(window)


@given(st.lists(st.tuples(tokens, st.integers(0, 99)), min_size=1, max_size=40), st.data())
def test_a_job_that_is_all_there_is_sorted_as_a_whole(
    prompts: list[tuple[list[int], int]], data: st.DataObject
) -> None:
    """Whatever runs: length by length, and one rank alone takes each length's prompts in order."""
    window = Window(is_job=True)
    for number, (prompt, output) in enumerate(prompts):
        window.running = data.draw(st.integers(0, 3))
        window.add(request(number, prompt, output))
    cursor, picked = None, []
    while len(window):
        picked.append(window.pick(cursor, []))
        cursor = picked[-1].prompt
    lengths = [each.output_tokens.bit_length() for each in picked]
    assert lengths == sorted(lengths, reverse=True)
    first = [each.prompt for each in picked if each.output_tokens.bit_length() == lengths[0]]
    assert first == sorted(first)


def test_what_comes_back_is_the_oldest_of_those_whose_turn_it_is() -> None:
    window = Window(is_job=False)
    window.running = 2  # one by one
    for number in range(3):
        window.add(request(number, [number]))
    for number in (4, 3):  # the latest of a rank's requests come first
        window.add_again(request(number, [number]))
    assert [each.number for each in window] == [3, 4, 0, 1, 2]
    assert {window.pick(None, []).number for _ in range(3)} == {3, 4, 0}
    assert [window.pick(None, []).number for _ in range(2)] == [1, 2]
    window.add_again(request(5, []))
    assert window.pick(None, []).number == 5 and not len(window)

"""Pages that are held, lent and given back: every page is in one place at any time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.sglang_hooks.residency.segments import Segments

FIRST, EACH, COUNT = 5, 4, 3
PAGES = set(range(FIRST, FIRST + EACH * COUNT))


@given(st.lists(st.tuples(st.sampled_from(["hold", "lend", "back"]), st.integers(0, 40))))
def test_no_page_is_lost_or_in_two_places(steps: list[tuple[str, int]]) -> None:
    segments = Segments(FIRST, EACH, COUNT)
    free, lent = set(range(1, 30)), set()
    for what, number in steps:
        if what == "hold":
            offered = np.array(sorted(free)[number % 7 :], dtype=np.int64)
            mask = segments.hold(offered)
            assert set(offered[mask]) == set(offered.tolist()) & PAGES
            free -= set(offered[mask].tolist())
        elif what == "lend":
            segment = segments.whole()
            if segment is not None:
                assert segment not in lent
                segments.lend(segment)
                lent.add(segment)
        else:
            before = segments.num_held
            given_back = segments.give_back(number)
            pages = given_back.pages.tolist()
            assert len(pages) == len(set(pages)) >= min(number, before)
            assert not set(pages) & free
            free |= set(pages)
            assert set(given_back.segments) <= lent
            lent -= set(given_back.segments)
            if given_back.segments:
                assert len(pages) < number + EACH, "no more are dropped than need be"
        held = set(segments.pages().tolist())
        assert len(held) == segments.num_held and not held & free and held | free >= PAGES
        assert segments.num_lent == len(lent)
        for segment in lent:
            first = FIRST + segment * EACH
            assert set(range(first, first + EACH)) <= held


def test_pages_of_no_block_go_first() -> None:
    segments = Segments(0, 2, 3)
    segments.hold(np.array([0, 1, 2, 3, 4]))
    segments.lend(0)
    segments.lend(1)
    back = segments.give_back(1)
    assert back.pages.tolist() == [4] and back.segments == []
    back = segments.give_back(1)
    assert back.pages.tolist() == [2, 3] and back.segments == [1], "the latest first, and whole"
    assert segments.give_back(9).pages.tolist() == [0, 1]
    assert segments.give_back(1).pages.tolist() == []

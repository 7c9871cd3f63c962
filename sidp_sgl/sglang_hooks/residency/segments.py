"""Runs of KV pages, each of which can hold a block while nobody needs it. Pure.

A page is free in SGLang's allocator, or held here, out of its reach. Where all pages of a segment
are held it may be lent. Held pages go back at once, those of no lent segment first.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Given:
    """What goes back: `pages` [n] int64, and the lent segments that they were of."""

    pages: np.ndarray
    segments: list[int]


class Segments:
    """`count` segments of `pages_each` pages, from page `first_page` on."""

    def __init__(self, first_page: int, pages_each: int, count: int) -> None:
        self.first_page = first_page
        self._held = np.zeros((count, pages_each), dtype=bool)
        self._lent: list[int] = []
        self.num_held = 0  # pages, lent ones among them

    @property
    def count(self) -> int:
        return len(self._held)

    @property
    def pages_each(self) -> int:
        return self._held.shape[1]

    @property
    def num_lent(self) -> int:
        """Segments."""
        return len(self._lent)

    def pages(self) -> np.ndarray:
        """All that are held, [n] int64."""
        return np.flatnonzero(self._held.reshape(-1)) + self.first_page

    def hold(self, free: np.ndarray) -> np.ndarray:
        """Take over those of the `free` pages [n] that belong to a segment; returns a mask [n] of
        them."""
        places = free - self.first_page
        is_ours = (places >= 0) & (places < self._held.size)
        self._held.reshape(-1)[places[is_ours]] = True
        self.num_held += int(is_ours.sum())
        return is_ours

    def has(self, pages: np.ndarray) -> np.ndarray:
        """Which of `pages` [n] are held; mask [n]."""
        if not self._held.size:
            return np.zeros(len(pages), dtype=bool)
        places = pages - self.first_page
        is_inside = (places >= 0) & (places < self._held.size)
        return is_inside & self._held.reshape(-1)[np.where(is_inside, places, 0)]

    def whole(self) -> int | None:
        """A segment that may be lent."""
        whole = np.asarray(self._held.all(axis=1))
        whole[self._lent] = False
        return int(whole.argmax()) if whole.any() else None

    def lend(self, segment: int) -> None:
        assert self._held[segment].all() and segment not in self._lent
        self._lent.append(segment)

    def give_back(self, num_pages: int) -> Given:
        """So many pages at least, or all that are held. Segments that lack the most go first; of
        those that are lent the latest, and whole ones."""
        pages: list[np.ndarray] = []
        missing = num_pages
        open_segments = [s for s in range(len(self._held)) if s not in self._lent]
        for segment in sorted(open_segments, key=lambda s: int(self._held[s].sum())):
            if missing <= 0:
                break
            pages.append(self._take(segment, missing))
            missing -= len(pages[-1])
        dropped = []
        while missing > 0 and self._lent:
            dropped.append(self._lent.pop())
            pages.append(self._take(dropped[-1], self.pages_each))
            missing -= self.pages_each
        return Given(np.concatenate([np.empty(0, np.int64), *pages]), dropped)

    def _take(self, segment: int, most: int) -> np.ndarray:
        places = np.flatnonzero(self._held[segment])[:most]
        self._held[segment, places] = False
        self.num_held -= len(places)
        return places + segment * self.pages_each + self.first_page


NO_SEGMENTS = Segments(0, 0, 0)

"""Which rank gets which request, and when: the DP controller's policy with `--sidp`.

Pure. A request stays in the window until a rank has room for it, so a rank that runs empty never
finds another with a queue before it; the few that wait at a rank nevertheless are called back when
another has room.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sidp_sgl.scheduler.dispatch.prompts import RecentPrompts
from sidp_sgl.scheduler.dispatch.window import Queued, Window
from sidp_sgl.scheduler.messages import RankState

BACKLOG = 2  # requests that may wait at a rank that has no room: one step is not lost
IMBALANCE = 4  # requests that a rank may have beyond the least loaded one, for a prefix's sake
_PREFIX_STEP = 16  # tokens; shorter differences in shared prefixes don't decide
_OUTPUT_LIMIT = 4096  # SGLang reserves no more output tokens than this for a new request


class Candidate(NamedTuple):
    """A rank with room, in the eyes of one request. All but `rank` in requests or tokens."""

    rank: int
    load: int
    shared_tokens: int
    room_tokens: int


def choose_rank(candidates: Sequence[Candidate], least_load: int) -> int:
    """The longest shared prefix first, then the most room; no rank gets far ahead of the others."""
    bound = least_load + max(IMBALANCE, least_load // 4)
    near = [c for c in candidates if c.load <= bound] or candidates
    return max(near, key=lambda c: (c.shared_tokens // _PREFIX_STEP, c.room_tokens, -c.load)).rank


class RankLoad:
    """What the controller knows of one rank: its latest state, and what was sent since."""

    def __init__(self) -> None:
        self.state: RankState | None = None
        self.recent = RecentPrompts()
        self.cursor: bytes | None = None  # its latest prompt
        self.stalled = 0  # requests that waited through a whole step
        self.is_recalled = False
        self._sent = 0
        self._costs: deque[int] = deque()  # tokens, of the latest requests sent

    @property
    def outstanding(self) -> int:
        """Requests that were sent and that the rank has not admitted, as far as is known."""
        if self.state is None:
            return self._sent
        return self.state.waiting_requests + max(0, self._sent - self.state.received)

    @property
    def load(self) -> int:
        return self.outstanding + (self.state.running_batch_size if self.state else 0)

    @property
    def room_tokens(self) -> int:
        """KV tokens that are neither in use nor spoken for."""
        if self.state is None:
            return 0
        return self.state.kv_headroom_tokens - sum(self._costs)

    @property
    def can_take(self) -> bool:
        if self.outstanding < BACKLOG:
            return True
        state = self.state
        if state is None or self.stalled or self.load >= state.max_running_requests:
            return False
        return self.room_tokens > 0

    @property
    def is_starved(self) -> bool:
        """Nothing waits here, and there is room for more."""
        state = self.state
        if state is None or self.outstanding:
            return False
        return not state.running_batch_size or (
            2 * state.kv_headroom_tokens > state.kv_capacity_tokens
            and state.running_batch_size < state.max_running_requests
        )

    def update(self, state: RankState) -> None:
        before = self.state.waiting_requests if self.state else 0
        self.stalled = min(before, state.waiting_requests)
        self.state = state
        self.is_recalled = False
        self.recent.capacity_tokens = state.kv_capacity_tokens
        self._forget_admitted()

    def send(self, queued: Queued) -> None:
        shared = self.recent.shared_tokens(queued.prompt)
        output = min(queued.output_tokens, _OUTPUT_LIMIT)
        self._costs.append(max(0, queued.prompt_tokens - shared) + output)
        self._sent += 1
        self.recent.add(queued.prompt)
        self.cursor = queued.prompt
        self._forget_admitted()

    def take_back(self) -> None:
        """One that was sent has come back."""
        self._sent -= 1
        if self._costs:
            self._costs.pop()

    def _forget_admitted(self) -> None:
        while len(self._costs) > self.outstanding:
            self._costs.popleft()


class Dispatcher:
    """One engine's. `assign` and `recalls` say what to do after whatever came in.

    `is_job`: the requests are one program's, which wants all of them soon; on a server nobody
    waits for long behind those who come later.
    """

    def __init__(self, num_ranks: int, is_job: bool) -> None:
        self.window = Window(is_job)
        self.ranks = [RankLoad() for _ in range(num_ranks)]
        self.sent = 0
        self.moved = 0

    def update(self, state: RankState) -> None:
        if state.rank < len(self.ranks):
            self.ranks[state.rank].update(state)
            states = (rank.state for rank in self.ranks)
            self.window.running = sum(each.running_batch_size for each in states if each)

    def send(self, rank: int, queued: Queued) -> None:
        """Somebody else has chosen the rank."""
        self.ranks[rank].send(queued)
        self.sent += 1

    def take_back(self, rank: int, queued: Queued) -> None:
        """A rank gives back what waited there."""
        self.ranks[rank].take_back()
        self.sent -= 1
        self.moved += 1
        self.window.add_again(queued)

    def assign(self) -> Iterator[tuple[int, Queued]]:
        """Requests and their ranks, until the window is empty or no rank has room."""
        while len(self.window):
            free = [n for n, rank in enumerate(self.ranks) if rank.can_take]
            if not free:
                return
            # What a rank has given back finds its own prefix there, and would wait there again.
            flowing = [n for n in free if not self.ranks[n].stalled]
            rank, queued = self._next(flowing or free)
            self.send(rank, queued)
            yield rank, queued

    def _next(self, free: list[int]) -> tuple[int, Queued]:
        """Few requests choose among the ranks; many are chosen from by the rank with most room."""
        if len(self.window) <= len(free):
            queued = self.window.oldest()
            candidates = [self._candidate(rank, queued) for rank in free]
            least = min(rank.load for rank in self.ranks)
            return choose_rank(candidates, least), self.window.remove(queued.number)
        chosen = max(free, key=lambda n: (self.ranks[n].room_tokens, -self.ranks[n].load))
        others = [
            rank.cursor
            for n, rank in enumerate(self.ranks)
            if n != chosen and rank.cursor is not None
        ]
        return chosen, self.window.pick(self.ranks[chosen].cursor, others)

    def _candidate(self, rank: int, queued: Queued) -> Candidate:
        load = self.ranks[rank]
        shared = load.recent.shared_tokens(queued.prompt)
        return Candidate(rank, load.load, shared, load.room_tokens)

    def recalls(self) -> Iterator[tuple[int, int]]:
        """(rank, requests that it shall give back): half of what waits there for long, while
        nothing else is left for a rank with room."""
        if len(self.window) or not any(rank.is_starved for rank in self.ranks):
            return
        donor = max(range(len(self.ranks)), key=lambda n: self.ranks[n].stalled)
        load = self.ranks[donor]
        if load.stalled and not load.is_recalled:
            load.is_recalled = True
            yield donor, (load.stalled + 1) // 2

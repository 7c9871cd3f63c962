"""One rank's requests: which are admitted, what their keys and values take, which are retracted.

The rules are SGLang's (PrefillAdder, retract_decode, NewTokenRatioTracker), with pages of one token
and without a prefix cache: prefill goes before decode, a prompt that does not fit into a pass is
cut into chunks, and where KV runs out the requests with the fewest output tokens go back to the end
of the queue.

All requests decode in step, so that a rank needs sums and a heap, and a step costs the same
whatever the batch.
"""

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush

from bench.simulator.job import Request
from sidp_sgl.planner.time_model import Work

INITIAL_RATIO = 0.7  # of its possible output that a running request is expected to need
LOWEST_RATIO = 0.7 * 0.14
RATIO_DECAY = (INITIAL_RATIO - LOWEST_RATIO) / 600  # per decode step
RETRACT_STEPS = 20  # decode steps that a retraction makes room for, in the new ratio
_PAGE = 1  # tokens


@dataclass(slots=True)
class Entry:
    """A request on this rank, and how far it has come. `generated` is right while it waits; while
    it runs, `generated` and the decode steps since `since` are."""

    request: Request
    max_new_tokens: int
    generated: int = 0  # output tokens
    cached: int = 0  # tokens of prompt and output in the KV cache, while it is prefilled
    since: int = 0  # decode steps of the rank when it began to run
    ends: int = -1  # decode steps of the rank when it will have ended; -1 while it doesn't run

    @property
    def to_prefill(self) -> int:
        """Tokens, generated ones after a retraction among them."""
        return self.request.input_len + self.generated

    @property
    def to_generate(self) -> int:
        """Tokens at most, as far as the scheduler knows."""
        return self.max_new_tokens - self.generated


class RankQueue:
    """`capacity`: KV tokens. Raises ValueError for a request that could never run."""

    def __init__(self, capacity: int, max_running: int, chunk: int, ignore_eos: bool) -> None:
        self.capacity = capacity
        self.used = 0  # tokens in the KV cache
        self.running_tokens = 0  # those that a decode step reads
        self.waiting_tokens = 0
        self.batch = 0
        self.retractions = 0
        self._max_running = max_running
        self._chunk = chunk
        self._ratio_is_one = ignore_eos
        self._ratio = 1.0 if ignore_eos else INITIAL_RATIO
        self._waiting: deque[Entry] = deque()
        self._running: dict[int, Entry] = {}  # by request number
        self._ending: list[tuple[int, int, Entry]] = []  # heap; entries that were retracted stay
        self._reserved = 0  # tokens that running requests may still generate
        self._decodes = 0
        self._is_full = False  # nothing was admitted; nothing has left since
        self._chunked: Entry | None = None
        self._prefilled: list[Entry] = []  # in the pass under way, to their end

    def submit(self, request: Request) -> None:
        """Like SGLang, allows no more output than the KV cache could hold."""
        limit = self.capacity - request.input_len - _PAGE - 1
        if request.output_len > limit:
            raise ValueError(
                f"{request.input_len} + {request.output_len} tokens of a request do not fit into "
                f"{self.capacity} KV tokens"
            )
        self._waiting.append(Entry(request, min(request.max_new_tokens, limit)))
        self.waiting_tokens += request.input_len

    @property
    def num_requests(self) -> int:
        return self.batch + len(self._waiting) + (self._chunked is not None)

    def begin_prefill(self) -> Work | None:
        """Admit what fits and say what the pass computes; None where nothing is admitted."""
        if self._chunked is None and (self._is_full or not self._waiting):
            return None
        budget, admitted = self._chunk, 0
        room = self.capacity - self.used - self._ratio * self._reserved
        rows, kv_tokens, scores = 0, 0, 0.0
        while budget > 0:
            entry = self._chunked
            if entry is None:
                if not self._waiting:
                    break
                entry = self._waiting[0]
                total = entry.to_prefill + entry.to_generate + _PAGE
                if self.batch + admitted >= self._max_running or total >= room:
                    self._is_full = True
                    break
                self._waiting.popleft()
                self.waiting_tokens -= entry.to_prefill
            taken = min(budget, entry.to_prefill - entry.cached, self.capacity - self.used)
            if taken == 0:
                break  # the rest of a cut prompt waits for memory
            rows += taken
            kv_tokens += entry.cached + taken
            scores += taken * (entry.cached + taken / 2)
            entry.cached += taken
            self.used += taken
            budget -= taken
            room -= taken
            is_cut = entry.cached < entry.to_prefill
            self._chunked = entry if is_cut else None
            if is_cut:
                break
            room -= entry.to_generate + _PAGE
            admitted += 1
            self._prefilled.append(entry)
        return Work(rows, kv_tokens, scores, len(self._prefilled)) if rows else None

    def end_prefill(self) -> tuple[list[Request], list[Request]]:
        """The requests that got a token, and those of them that are done with it."""
        prefilled, self._prefilled = self._prefilled, []
        done = []
        for entry in prefilled:
            request = entry.request
            entry.generated += 1
            if entry.generated == request.output_len:
                self.used -= entry.cached
                done.append(request)
                continue
            entry.since = self._decodes
            entry.ends = self._decodes + request.output_len - entry.generated
            self._running[request.number] = entry
            heappush(self._ending, (entry.ends, request.number, entry))
            self.batch += 1
            self.running_tokens += entry.cached
            self._reserved += entry.to_generate
            entry.cached = 0
        if done:
            self._is_full = False
        return [entry.request for entry in prefilled], done

    def begin_decode(self) -> int:
        """Make room for one token each, and say how many requests get one; may be 0."""
        if self.capacity - self.used < self.batch:
            self._retract()
        elif not self._ratio_is_one:
            self._ratio = max(self._ratio - RATIO_DECAY, LOWEST_RATIO)
        self.used += self.batch
        self.running_tokens += self.batch
        return self.batch

    def end_decode(self) -> list[Request]:
        """The requests that are done."""
        self._decodes += 1
        self._reserved -= self.batch
        done = []
        ending = self._ending
        while ending and ending[0][0] <= self._decodes:
            ends, number, entry = heappop(ending)
            if ends == entry.ends:
                self._leave(entry)
                del self._running[number]
                done.append(entry.request)
        return done

    def _leave(self, entry: Entry) -> None:
        """Free the tokens of a running request, its own count of them brought up to date."""
        entry.generated += self._decodes - entry.since
        tokens = entry.to_prefill - 1  # the last one is not in the cache
        self.used -= tokens
        self.running_tokens -= tokens
        self._reserved -= entry.to_generate
        self.batch -= 1
        entry.ends = -1
        self._is_full = False

    def _put_back(self, entry: Entry) -> None:
        """A prompt that was cut has kept the last running request from going on."""
        self.used -= entry.cached
        entry.cached = 0
        self._chunked = None
        self._waiting.append(entry)
        self.waiting_tokens += entry.to_prefill

    def _retract(self) -> None:
        """Keep those that have generated most, of these the ones with the shortest prompts."""
        order = sorted(
            self._running.values(),
            key=lambda e: (e.generated - e.since, -e.request.input_len, -e.request.number),
        )
        for entry in order[:-1]:
            self._leave(entry)
            del self._running[entry.request.number]
            entry.request.retractions += 1
            self.retractions += 1
            self._waiting.append(entry)
            self.waiting_tokens += entry.to_prefill
            if self.capacity - self.used >= self.batch:
                break
        if self.capacity - self.used < self.batch and self._chunked is not None:
            self._put_back(self._chunked)
        if not self._ratio_is_one:
            limits = sum(entry.max_new_tokens for entry in self._running.values())
            generated = limits - self._reserved
            self._ratio = min(1.0, (generated + RETRACT_STEPS * self.batch) / (limits + 1))

"""The owner's side of a negotiation: which rank may use which rows of the staging area.

Messages may come late, twice, in any order or never. A rank's step numbers
increase, so whatever speaks of a step tells that all older ones are over.
"""

from sidp_sgl.scheduler.messages import LeaseDecline, LeaseGrant, LeaseRelease, LeaseRequest

STALE = "stale"
NO_ROWS = "no rows"
TOO_MANY_ROWS = "too many rows"
Answer = LeaseGrant | LeaseDecline


class LeaseLedger:
    """Leases on staging rows, at most one per requesting rank. For one thread.

    Every requester has `rows_per_rank` rows of its own, one behind the other: TP ranks above 0 may
    still be in a step whose lease TP rank 0 has given back, and nobody else's rows may come there.

    A rank that was granted a step, and has neither released it nor begun a newer one, holds the
    lease of that step here: nothing else ends it.
    """

    def __init__(self, rows_per_rank: int) -> None:
        self.rows_per_rank = rows_per_rank
        self._leases: dict[int, LeaseGrant] = {}  # by requesting rank
        self._answered: dict[int, tuple[LeaseRequest, Answer]] = {}  # by rank: its latest step
        self._closed: dict[int, int] = {}  # by rank: its latest step that was released

    def request(self, owner: int, message: LeaseRequest, refusal: str | None = None) -> Answer:
        """The answer of `owner` (this rank). `refusal`: why it does not want to serve, if so."""
        rank, step = message.rank, message.step
        latest, answer = self._answered.get(rank, (None, None))
        if step <= self._closed.get(rank, -1) or (latest is not None and step < latest.step):
            return LeaseDecline(owner, rank, step, STALE)
        if latest is not None and answer is not None and step == latest.step:
            # One step, one answer: a duplicate of a declined request must not get a lease.
            return answer if message == latest else LeaseDecline(owner, rank, step, STALE)
        self._leases.pop(rank, None)
        answer = self._answer(owner, message, refusal)
        if isinstance(answer, LeaseGrant):
            self._leases[rank] = answer
        self._answered[rank] = message, answer
        return answer

    def _answer(self, owner: int, message: LeaseRequest, refusal: str | None) -> Answer:
        rank, rows = message.rank, message.rows
        if refusal is None and 1 <= rows <= self.rows_per_rank:
            first = (rank - (rank > owner)) * self.rows_per_rank
            return LeaseGrant(owner, rank, message.step, first, rows)
        reason = refusal or (NO_ROWS if rows < 1 else TOO_MANY_ROWS)
        return LeaseDecline(owner, rank, message.step, reason)

    def release(self, message: LeaseRelease) -> None:
        """End the rank's lease unless it is of a newer step; a request that comes later is stale.

        An older step's lease ends too: the newer step's own request may have been lost.
        """
        rank, step = message.rank, message.step
        self._closed[rank] = max(step, self._closed.get(rank, -1))
        if rank in self._leases and self._leases[rank].step <= step:
            del self._leases[rank]

    def leases(self) -> dict[int, tuple[int, int, int]]:
        """Requesting rank → (step, offset, rows)."""
        return {r: (lease.step, lease.offset, lease.rows) for r, lease in self._leases.items()}

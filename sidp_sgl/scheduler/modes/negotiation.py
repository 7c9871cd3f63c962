"""The requester's side of a negotiation: rows asked of all owners, their answers, the release.

Nothing waits here: whoever sees no decision in time abandons, and streams.
"""

from collections.abc import Sequence

from sidp_sgl.scheduler.messages import LeaseDecline, LeaseGrant, LeaseRelease, LeaseRequest


class Negotiation:
    """What `rank` negotiates with `owners`, one step at a time. For one thread.

    `requests` counts the negotiations begun, `granted` and `declined` those that ended so (the
    others were abandoned undecided), `stale` the answers that were of no use.
    """

    def __init__(self, rank: int, owners: Sequence[int]) -> None:
        self.requests = self.granted = self.declined = self.stale = 0
        self._rank = rank
        self.owners = tuple(owners)
        self._step = 0
        self._close()

    def _close(self) -> None:
        self._is_current = False
        self._rows = 0
        self._offsets: dict[int, int] = {}  # of the owners that granted
        self._decliners: set[int] = set()

    def begin(self, rows: int) -> list[tuple[int, LeaseRequest]]:
        """Ask every owner for `rows` rows. Returns (owner, message) pairs to send.

        The previous negotiation is over, its rows must not be used any more: the owners free them
        when the new request comes.
        """
        self._close()
        self._is_current = True
        self._rows = rows
        self._step += 1
        self.requests += 1
        self._count_if_granted()  # a rank that asks nobody has all it needs
        return [(owner, LeaseRequest(self._rank, self._step, rows)) for owner in self.owners]

    def on_message(self, message: LeaseGrant | LeaseDecline) -> list[tuple[int, LeaseRelease]]:
        """Take an owner's answer. Returns (owner, message) pairs to send."""
        owner, step = message.owner, message.step
        # A step that was not begun yet must never be released: that would close it.
        is_own = message.rank == self._rank and owner in self.owners and step <= self._step
        if is_own and not self._is_current:
            self.stale += 1
            is_lease = isinstance(message, LeaseGrant)
            return [(owner, LeaseRelease(self._rank, step))] if is_lease else []
        if not is_own or step != self._step or owner in self._offsets or owner in self._decliners:
            self.stale += 1  # a lease of an older step ends by the request that is under way
            return []
        if isinstance(message, LeaseGrant) and message.rows >= self._rows:
            self._offsets[owner] = message.offset
            self._count_if_granted()
        else:
            self.declined += not self._decliners
            self._decliners.add(owner)
        return []

    def _count_if_granted(self) -> None:
        self.granted += self.is_granted

    def abandon(self) -> list[tuple[int, LeaseRelease]]:
        """End the current negotiation, used or not; the rows must not be used any more.

        Every owner is told, also those that have not answered: their grant may be on its way.
        Returns (owner, message) pairs to send; none where nothing is current.
        """
        if not self._is_current:
            return []
        self._close()
        return [(owner, LeaseRelease(self._rank, self._step)) for owner in self.owners]

    @property
    def is_decided(self) -> bool:
        """All have granted, or one has declined; False where nothing is current."""
        return self.is_granted or bool(self._decliners)

    @property
    def is_granted(self) -> bool:
        return self._is_current and len(self._offsets) == len(self.owners)

    @property
    def rows(self) -> int:
        """Rows asked for; 0 where nothing is current."""
        return self._rows

    @property
    def offsets(self) -> dict[int, int]:
        """Owner → first leased row; empty unless all have granted."""
        return dict(self._offsets) if self.is_granted else {}

    @property
    def step(self) -> int:
        """The latest negotiation's number; 0 before the first."""
        return self._step

"""The requester's side of a negotiation: rows asked of all owners, and their answers.

Nothing waits here: whoever sees no decision in time abandons, and streams.
"""

from collections.abc import Sequence

from sidp_sgl.scheduler.messages import LeaseDecline, LeaseGrant, LeaseRequest


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
        self.abandon()

    def abandon(self) -> None:
        """End the current negotiation, used or not; the rows must not be used any more."""
        self._is_current = False
        self._rows = 0
        self._granters: set[int] = set()
        self._decliners: set[int] = set()

    def begin(self, rows: int) -> list[tuple[int, LeaseRequest]]:
        """Ask every owner for `rows` rows. Returns (owner, message) pairs to send.

        The previous negotiation is over, its rows must not be used any more.
        """
        self.abandon()
        self._is_current = True
        self._rows = rows
        self._step += 1
        self.requests += 1
        self._count_if_granted()  # a rank that asks nobody has all it needs
        return [(owner, LeaseRequest(self._rank, self._step, rows)) for owner in self.owners]

    def on_message(self, message: LeaseGrant | LeaseDecline) -> None:
        """Take an owner's answer."""
        owner, has_answered = message.owner, self._granters | self._decliners
        is_current = self._is_current and (message.rank, message.step) == (self._rank, self._step)
        if not is_current or owner not in self.owners or owner in has_answered:
            self.stale += 1
        elif isinstance(message, LeaseGrant) and message.rows >= self._rows:
            self._granters.add(owner)
            self._count_if_granted()
        else:
            self.declined += not self._decliners
            self._decliners.add(owner)

    def _count_if_granted(self) -> None:
        self.granted += self.is_granted

    @property
    def is_decided(self) -> bool:
        """All have granted, or one has declined; False where nothing is current."""
        return self.is_granted or bool(self._decliners)

    @property
    def is_granted(self) -> bool:
        return self._is_current and len(self._granters) == len(self.owners)

    @property
    def rows(self) -> int:
        """Rows asked for; 0 where nothing is current."""
        return self._rows

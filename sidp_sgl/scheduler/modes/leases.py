"""What an owner answers to a rank that asks for staging rows.

Pure, and without memory: every requester has rows of its own (`weightpool/cas/staging.py`), so that
no lease is in another's way, and messages may come late, twice, in any order or never.
"""

from sidp_sgl.scheduler.messages import LeaseDecline, LeaseGrant, LeaseRequest

NO_ROWS = "no rows"
TOO_MANY_ROWS = "too many rows"


def answer(
    owner: int, request: LeaseRequest, rows_per_rank: int, refusal: str | None = None
) -> LeaseGrant | LeaseDecline:
    """Of `owner`, whose staging has `rows_per_rank` rows for every other rank. `refusal`: why it
    does not want to serve, if so."""
    rank, rows = request.rank, request.rows
    if refusal is None and 1 <= rows <= rows_per_rank:
        return LeaseGrant(owner, rank, request.step, rows)
    reason = refusal or (NO_ROWS if rows < 1 else TOO_MANY_ROWS)
    return LeaseDecline(owner, rank, request.step, reason)

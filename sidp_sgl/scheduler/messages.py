"""The control messages between an engine's processes, and their bytes; no tensor among them."""

from typing import Annotated

from msgspec import Meta, Struct, msgpack

Count = Annotated[int, Meta(ge=0)]


class _Message(Struct, frozen=True, forbid_unknown_fields=True, tag=True, tag_field="kind"):
    """A rank in a message is a DP rank: only its member at TP rank 0 sends and hears any."""


class RankState(_Message, frozen=True):
    """To the DP controller: one rank after one of its scheduler's iterations."""

    rank: Count
    running_batch_size: Count
    waiting_requests: Count
    received: Count  # requests that the DP controller has sent and the rank has read
    max_running_requests: Count
    kv_capacity_tokens: Count
    kv_headroom_tokens: Count  # free + evictable


class Recall(_Message, frozen=True):
    """From the DP controller: give back requests that wait, the latest first."""

    requests: Count


class DispatchUpdate(_Message, frozen=True):
    """From the DP controller: what it has dispatched, for the ranks' status."""

    queued: Count  # requests that wait in the controller
    sent: Count
    moved: Count  # given back by one rank and sent to another


class LeaseRequest(_Message, frozen=True):
    """To an owner: lease me staging rows for my step; the one before is over."""

    rank: Count
    step: Count  # number of the rank's negotiation; increases
    rows: Count


class LeaseGrant(_Message, frozen=True):
    """To a requester: the owner serves this step."""

    owner: Count
    rank: Count
    step: Count
    rows: Count


class LeaseDecline(_Message, frozen=True):
    """To a requester: no rows are leased for this step."""

    owner: Count
    rank: Count
    step: Count
    reason: str  # a few words


Message = RankState | Recall | DispatchUpdate | LeaseRequest | LeaseGrant | LeaseDecline
_decoder = msgpack.Decoder(Message)
encode = msgpack.encode


def decode(data: bytes) -> Message | None:
    """None where the bytes are no message, exactly as `encode` writes it."""
    try:
        return _decoder.decode(data)
    except ValueError:  # msgspec's own errors, and text that is no UTF-8
        return None

"""The control messages between ranks, and their bytes. Control only: tensors never travel here.

Room: scheduler. What is malformed decodes to None; whoever receives counts and drops it.
"""

from dataclasses import dataclass, fields
from typing import Any

import orjson

from sidp_sgl.scheduler.modes.policy import CAS, WAS
from sidp_sgl.scheduler.state import RankState

VERSION = 2


@dataclass(frozen=True)
class StateUpdate:
    """To all: the sender's state."""

    state: RankState


@dataclass(frozen=True)
class CasRequest:
    """To an owner: lease me staging rows for my step."""

    rank: int
    step: int  # number of the rank's negotiation; increases
    rows: int


@dataclass(frozen=True)
class CasGrant:
    """To a requester: the rows are leased until the step is released or superseded."""

    owner: int
    rank: int
    step: int
    offset: int  # first leased row of the owner's staging area
    rows: int


@dataclass(frozen=True)
class CasDecline:
    """To a requester: no rows are leased for this step."""

    owner: int
    rank: int
    step: int
    reason: str  # a few words


@dataclass(frozen=True)
class CasRelease:
    """To an owner: the rank uses no lease of this step, or of an older one, any more."""

    rank: int
    step: int


@dataclass(frozen=True)
class Recall:
    """From the DP controller: give back requests that wait, the latest first."""

    requests: int


@dataclass(frozen=True)
class DispatchUpdate:
    """From the DP controller: what it has dispatched, for the ranks' status."""

    queued: int  # requests that wait in the controller
    sent: int
    moved: int  # given back by one rank and sent to another


Message = StateUpdate | CasRequest | CasGrant | CasDecline | CasRelease | Recall | DispatchUpdate
_CLASSES: dict[str, type[Message]] = {
    "state": StateUpdate,
    "cas_request": CasRequest,
    "cas_grant": CasGrant,
    "cas_decline": CasDecline,
    "cas_release": CasRelease,
    "recall": Recall,
    "dispatch": DispatchUpdate,
}
_KINDS = {cls: kind for kind, cls in _CLASSES.items()}
_FIELDS: dict[type, dict[str, Any]] = {
    cls: {field.name: field.type for field in fields(cls)} for cls in (*_KINDS, RankState)
}


def encode(message: Message) -> bytes:
    values = {name: getattr(message, name) for name in _FIELDS[type(message)]}
    return orjson.dumps({"v": VERSION, "kind": _KINDS[type(message)], **values})


def decode(data: bytes) -> Message | None:
    """None where the bytes are no message of this version, exactly as `encode` writes it."""
    try:
        values = orjson.loads(data)
        version, kind = values.pop("v"), values.pop("kind")
        if type(version) is not int or version != VERSION:
            return None
        return _build(_CLASSES[kind], values)
    except (orjson.JSONDecodeError, KeyError, ValueError, TypeError, AttributeError):
        return None


def _build(cls: type, values: Any) -> Any:
    expected = _FIELDS[cls]
    if type(values) is not dict or values.keys() != expected.keys():
        raise ValueError(cls)
    return cls(**{name: _checked(name, kind, values[name]) for name, kind in expected.items()})


def _checked(name: str, kind: Any, value: Any) -> Any:
    """The value of one field; raises ValueError where it cannot be one."""
    if kind is RankState:
        return _build(RankState, value)
    if name == "mode" and value not in (WAS, CAS):
        raise ValueError(name)
    if kind is float and type(value) is int:  # how some writers write 2.0
        value = float(value)
    # `type`, not isinstance: to Python True is an int. (orjson reads neither NaN nor infinity.)
    if type(value) is not kind or (kind is not str and value < 0):
        raise ValueError(name)
    return value

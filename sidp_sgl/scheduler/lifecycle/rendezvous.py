"""Where the members of a group meet once, while loading: they compare and exchange their offers.

Every member listens on an abstract Unix socket (no file anywhere), serves its offer to each peer
and asks each peer for its own; file descriptors travel beside the offer.
"""

import array
import os
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import json

from sidp_sgl.errors import SidpError
from sidp_sgl.scheduler.lifecycle.credentials import peer
from sidp_sgl.scheduler.member import Member

TIMEOUT_SECONDS = 600.0
_MAX_FDS = 16


class RendezvousError(SidpError):
    """The members could not meet, or they differ."""


@dataclass(frozen=True)
class Offer:
    """What one member gives to the others."""

    member: Member
    fingerprint: Mapping[str, Any]  # JSON values; must be equal on all members
    content: Mapping[str, Any]  # JSON values
    file_descriptors: list[int]


def exchange(
    engine: str, own: Offer, dp_size: int, timeout: float = TIMEOUT_SECONDS
) -> dict[int, Offer]:
    """Meet the other members of the own group in an `engine`; returns their offers by DP rank.

    Raises RendezvousError with the reason when a member differs or does not come in time.
    """
    deadline = time.monotonic() + timeout
    peers = [own.member._replace(dp_rank=n) for n in range(dp_size) if n != own.member.dp_rank]
    offers: dict[int, Offer] = {}
    try:
        with _listen(engine, own.member) as listener:
            served = threading.Thread(
                target=_serve, args=(listener, own, len(peers), deadline), daemon=True
            )
            served.start()
            for member in peers:
                offers[member.dp_rank] = _ask(engine, member, deadline, timeout)
            served.join(max(0.0, deadline - time.monotonic()))
            if served.is_alive():
                raise RendezvousError(
                    f"{own.member} was not asked by all others within {timeout:.0f} s"
                )
        # Not before everyone has been served: the others shall see a difference, not a silence.
        for offer in offers.values():
            compare(own, offer)
    except BaseException:
        for offer in offers.values():
            _close_all(offer.file_descriptors)
        raise
    return offers


def compare(own: Offer, other: Offer) -> None:
    """Raise RendezvousError naming the first thing in which two fingerprints differ."""
    for key in sorted({*own.fingerprint, *other.fingerprint}):
        mine, theirs = own.fingerprint.get(key), other.fingerprint.get(key)
        if mine != theirs:
            raise RendezvousError(
                f"{own.member} and {other.member} differ in {key}: {mine!r} and {theirs!r}; "
                "all ranks of a group need the same software, flags and checkpoint"
            )


def _address(engine: str, member: Member) -> str:
    return f"\0sidp-{engine}-{member.dp_rank}-{member.tp_rank}"


def _listen(engine: str, member: Member) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(_address(engine, member))
    listener.listen(64)
    return listener


def _serve(listener: socket.socket, own: Offer, num_peers: int, deadline: float) -> None:
    body = json.encode((own.member, own.fingerprint, own.content))
    header = struct.pack("<QI", len(body), len(own.file_descriptors))
    served = 0
    while served < num_peers and time.monotonic() < deadline:
        try:
            listener.settimeout(1.0)
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        except OSError:
            return  # closed: the rendezvous has failed elsewhere
        with connection:
            if peer(connection)[1] != os.getuid():
                continue
            connection.settimeout(30.0)
            try:
                socket.send_fds(connection, [header], own.file_descriptors)
                connection.sendall(body)
                served += connection.recv(1) == b"\x01"
            except OSError:
                continue  # that peer asks again or has died


def _ask(engine: str, member: Member, deadline: float, timeout: float) -> Offer:
    while time.monotonic() < deadline:
        try:
            return _ask_once(engine, member, deadline)
        except OSError:
            time.sleep(0.02)  # not there yet
    raise RendezvousError(f"{member} did not come to the rendezvous within {timeout:.0f} s")


def _ask_once(engine: str, member: Member, deadline: float) -> Offer:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(min(30.0, max(0.1, deadline - time.monotonic())))
        connection.connect(_address(engine, member))
        header, ancillary, _, _ = connection.recvmsg(12, socket.CMSG_SPACE(4 * _MAX_FDS))
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        try:
            if len(header) < 12:
                raise ConnectionResetError("the peer closed before it had answered")
            length, num_fds = struct.unpack("<QI", header)
            body = bytearray()
            while len(body) < length:
                piece = connection.recv(min(1 << 20, length - len(body)))
                if not piece:
                    raise ConnectionResetError("the peer closed in the middle of its offer")
                body += piece
            if len(fds) != num_fds:
                raise ConnectionResetError("file descriptors were lost on the way")
            connection.sendall(b"\x01")
        except OSError:
            _close_all(fds)
            raise
    offered = json.decode(body, type=tuple[Member, dict[str, Any], dict[str, Any]])
    return Offer(*offered, list(fds))


def _close_all(file_descriptors: Iterable[int]) -> None:
    for fd in file_descriptors:
        os.close(fd)

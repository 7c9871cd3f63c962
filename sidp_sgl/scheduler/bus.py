"""Control messages over ZMQ.

Sending never blocks and nothing depends on an arrival: a message that can't be sent is dropped and
counted, one that can't be read as well. A socket belongs to one thread. The addresses are abstract:
nothing of them is left, however a process ends.
"""

import math
import os
from collections.abc import Iterator, Mapping

import zmq

from sidp_sgl.scheduler import messages
from sidp_sgl.scheduler.messages import Message

_QUEUE = 1000  # messages that may wait for a receiver that is stopped


def requests_address(engine: str, rank: int) -> str:
    """Where a rank hears requests for leases."""
    return f"ipc://@sidp-{engine}-requests-{rank}"


def answers_address(engine: str, rank: int) -> str:
    """Where a rank hears the answers to its own requests."""
    return f"ipc://@sidp-{engine}-answers-{rank}"


def dispatch_address(engine: str, rank: int) -> str:
    """Where a rank hears the DP controller."""
    return f"ipc://@sidp-{engine}-dispatch-{rank}"


def states_address(engine: str) -> str:
    """Where the DP controller hears the ranks."""
    return f"ipc://@sidp-{engine}-states"


def returns_address(engine: str) -> str:
    """Where the DP controller takes requests that ranks give back."""
    return f"ipc://@sidp-{engine}-returns"


def listen(address: str) -> zmq.Socket:
    """A PULL socket that takes messages of this user's processes only."""
    socket: zmq.Socket = zmq.Context.instance().socket(zmq.PULL)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.RCVHWM, _QUEUE)
    socket.set(zmq.IPC_FILTER_UID, os.getuid())
    socket.bind(address)
    return socket


class Inbox:
    """Receives everything that is sent to one address."""

    def __init__(self, address: str) -> None:
        self.malformed = 0
        self._socket = listen(address)

    @property
    def socket(self) -> zmq.Socket:
        """For a poller."""
        return self._socket

    def receive(self, seconds: float) -> Message | None:
        """The next message; None where none comes within `seconds`, or none that can be read."""
        if not self._socket.poll(math.ceil(seconds * 1e3)):
            return None
        try:
            message = messages.decode(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None
        self.malformed += message is None
        return message

    def drain(self) -> Iterator[Message]:
        """What has come so far."""
        while self._socket.poll(0):
            if (message := self.receive(0.0)) is not None:
                yield message

    def close(self) -> None:
        self._socket.close()


class Outbox:
    """Sends to several addresses, each under a key of the caller's."""

    def __init__(self, addresses: Mapping[int, str]) -> None:
        self.sent = 0
        self.dropped = 0
        self._sockets = {key: self._connect(address) for key, address in addresses.items()}

    def _connect(self, address: str) -> zmq.Socket:
        socket: zmq.Socket = zmq.Context.instance().socket(zmq.PUSH)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, _QUEUE)
        socket.connect(address)
        return socket

    def send(self, key: int, message: Message) -> None:
        self.send_bytes(key, messages.encode(message))

    def send_to_all(self, message: Message) -> None:
        data = messages.encode(message)
        for key in self._sockets:
            self.send_bytes(key, data)

    def send_bytes(self, key: int, data: bytes) -> None:
        try:
            self._sockets[key].send(data, zmq.NOBLOCK)
            self.sent += 1
        except zmq.Again:
            self.dropped += 1

    def close(self) -> None:
        for socket in self._sockets.values():
            socket.close()

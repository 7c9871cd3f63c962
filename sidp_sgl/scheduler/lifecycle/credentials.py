"""Who is at the other end of a Unix socket."""

import socket
import struct


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, user, _ = struct.unpack("iii", credentials)
    return pid, user

"""Who is at the other end of a Unix socket."""

from __future__ import annotations

import socket
import struct


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """pid and uid of the process that made the socket that `connection` is connected to.  Raises OSError.

    The pid is 0 when the process lives in a pid namespace that we cannot see.
    """
    pid, uid, _gid = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid

"""Who is at the other end of a Unix socket."""

from __future__ import annotations

# Python's own socket module makes an enumeration of each family of constants: 8 ms, in a probe that takes 20.
import _socket
import struct


def peer_of(connection: _socket.socket) -> tuple[int, int]:
    """pid and uid of the process that made the socket that `connection` is connected to.  Raises OSError.

    The pid is 0 when the process lives in a pid namespace that we cannot see.
    """
    pid, uid, _gid = struct.unpack("=iII", connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))
    return pid, uid

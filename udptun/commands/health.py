"""`udptun health`: does the daemon live, is the network ready; for exec probes, which come every few seconds.

It costs little more than the start of Python, so it reads its arguments by hand and imports next to nothing.
"""

from __future__ import annotations

import _socket  # see kernel/peer.py
import os
import struct

from udptun.core.daemon_socket import DEFAULT_RUN_DIR, SOCKET_NAME
from udptun.core.errors import UdptunError, UsageError
from udptun.kernel.peer import peer_of

TYPE_CHECKING = False
"""As typing's, see cli.py."""
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

USAGE = f"""\
usage: udptun health [--live | --ready] [--run-dir DIR]

Ask the daemon of this host over its status socket; exit status 0 when all is well, 1 with one line when not.

--live         a daemon answers: it does not hang.  It need not be ready, nor reach its store
--ready        the network is ready, by a daemon of this container (the default)
--run-dir DIR  the daemon's --run-dir (default: FLANNELD_RUN_DIR, else {DEFAULT_RUN_DIR})
"""

_TIMEOUT_S = 5


def run(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Returns 0 when all is well.  Raises UdptunError saying what is not, and UsageError."""
    path, run_dir = "/readyz", environ.get("FLANNELD_RUN_DIR") or DEFAULT_RUN_DIR
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if word in ("-h", "--help", "-help"):
            print(USAGE, end="")
            return 0
        if word in ("--live", "--ready"):
            path = {"--live": "/healthz", "--ready": "/readyz"}[word]
        elif flag == "--run-dir" and (value := value if equals else next(words, "")):
            run_dir = value
        else:
            raise UsageError(f"health: unknown or incomplete argument {word} (udptun health --help says what it takes)")
    _ask(f"{run_dir}/{SOCKET_NAME}", path)
    return 0


def _ask(where: str, path: str) -> None:
    """Raises UdptunError unless the daemon that listens at `where` answers a GET of `path` with 200."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        # connect() waits for room in a full queue of a Unix socket, as long as this says.
        for option in (_socket.SO_SNDTIMEO, _socket.SO_RCVTIMEO):
            connection.setsockopt(_socket.SOL_SOCKET, option, struct.pack("ll", _TIMEOUT_S, 0))
        connection.connect(where)
        pid, uid = peer_of(connection)
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: udptun\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode(errors="replace")
    except BlockingIOError as exc:
        raise UdptunError(f"the daemon does not answer at {where} within {_TIMEOUT_S} s: it hangs") from exc
    except OSError as exc:
        raise UdptunError(f"no daemon answers at {where}: {exc.strerror or exc}") from exc
    finally:
        connection.close()
    if uid not in (0, os.geteuid()):
        raise UdptunError(f"{where} belongs to uid {uid}, who is no daemon of ours; delete it")
    head, _, body = answer.partition("\r\n\r\n")
    if head.split()[1:2] != ["200"]:
        raise UdptunError(body.strip() or "the daemon left without an answer")
    # Containers of one host share the directory.  The one that waits for its turn is not ready because the other is.
    if path == "/readyz" and pid == 0:
        raise UdptunError("not ready: the daemon of another container serves this host")

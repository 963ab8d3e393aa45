"""A stand-in for systemd: it listens at NOTIFY_SOCKET, and keeps descriptors as a unit's descriptor store does."""

from __future__ import annotations

import os
import socket
from pathlib import Path


class Manager:
    """Reads when it is told to.  `kept`: the descriptors by their names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: dict[str, int] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(path))

    def read(self) -> list[str]:
        """Take all that has come, and do it; the states in it."""
        said = []
        while True:
            try:
                message, fds, _flags, _address = socket.recv_fds(self._socket, 4096, 8)
            except BlockingIOError:
                return said
            said.append(message.decode())
            self._obey(dict(line.split("=", 1) for line in said[-1].split("\n")), fds)

    def _obey(self, fields: dict[str, str], fds: list[int]) -> None:
        if fields.get("FDSTORE") == "1":
            # It would look at what poll(2) says, and drop the queue of a device that is gone.
            assert fields["FDPOLL"] == "0"
            (fd,) = fds
            # It compares by kcmp(2), and keeps the first name.  Queues and eventfds have no inodes of their own.
            has_inode = not {"tun", "event"} & set(fields["FDNAME"].split("/"))
            if has_inode and any(os.path.sameopenfile(fd, it) for it in self.kept.values()):
                os.close(fd)
            else:
                self.kept[fields["FDNAME"]] = fd
        elif "FDSTOREREMOVE" in fields:
            os.close(self.kept.pop(fields["FDNAME"]))
        else:
            # Of a barrier: whoever waits for it sees that it is closed.
            for fd in fds:
                os.close(fd)

    def close(self) -> None:
        self._socket.close()
        for fd in self.kept.values():
            os.close(fd)

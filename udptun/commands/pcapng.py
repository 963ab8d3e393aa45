"""Packets in a file that Wireshark and tshark read: pcapng (draft-ietf-opsawg-pcapng).

Each block goes to the file with one system call.  So the file is whole up to its last block, whenever we end.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from udptun import __version__
from udptun.core.errors import UdptunError

_SECTION, _INTERFACE, _STATISTICS, _PACKET = 0x0A0D0D0A, 1, 5, 6
_BYTE_ORDER, _VERSION, _LENGTH_UNKNOWN = 0x1A2B3C4D, (1, 0), -1
_RAW = 101
"""Link type of bare packets of IPv4 and IPv6."""
_COMMENT, _USER_APPLICATION, _INTERFACE_NAME, _TIME_RESOLUTION, _FLAGS, _RECEIVED, _DROPPED = 1, 4, 2, 9, 2, 4, 5
_NANOSECONDS = bytes([9])
_INBOUND, _OUTBOUND = 1, 2
_TEXT_MAX = 65535


class PcapngFile:
    """A new file at `path`, for its owner alone.  Raises UdptunError when it cannot be made or written to."""

    def __init__(self, path: Path, interfaces: Sequence[str], snap_len: int) -> None:
        """`interfaces`: the names of the devices that packets belong to; `snap_len`: bytes of a packet at most."""
        self._path, self._interfaces = path, list(interfaces)
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise UdptunError(f"cannot write {path}: it is there already; name another file, or remove it") from None
        except OSError as exc:
            raise UdptunError(f"cannot write {path}: {exc.strerror or exc}") from exc
        try:
            head = struct.pack("=IHHq", _BYTE_ORDER, *_VERSION, _LENGTH_UNKNOWN)
            self._write(_SECTION, head, [(_USER_APPLICATION, f"udptun {__version__}".encode())])
            for name in interfaces:
                options = [(_INTERFACE_NAME, name.encode()), (_TIME_RESOLUTION, _NANOSECONDS)]
                self._write(_INTERFACE, struct.pack("=HHI", _RAW, 0, snap_len), options)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._fd)

    def add(self, packet: bytes, *, length: int, time_ns: int, interface: str, is_outgoing: bool, comment: str) -> None:
        """`packet` is what is there of `length` bytes; `time_ns`: since the epoch."""
        head = self._head(interface, time_ns) + struct.pack("=II", len(packet), length) + _padded(packet)
        flags = struct.pack("=I", _OUTBOUND if is_outgoing else _INBOUND)
        self._write(_PACKET, head, [(_COMMENT, comment.encode()[:_TEXT_MAX]), (_FLAGS, flags)])

    def add_statistics(self, *, n_packets: int, n_lost: int, time_ns: int) -> None:
        """Of all interfaces together, at the first one: packets that are in the file, and that are not."""
        counts = [(_RECEIVED, struct.pack("=Q", n_packets + n_lost)), (_DROPPED, struct.pack("=Q", n_lost))]
        self._write(_STATISTICS, self._head(self._interfaces[0], time_ns), counts)

    def _head(self, interface: str, time_ns: int) -> bytes:
        return struct.pack("=III", self._interfaces.index(interface), time_ns >> 32, time_ns & 0xFFFFFFFF)

    def _write(self, kind: int, body: bytes, options: Sequence[tuple[int, bytes]]) -> None:
        body += b"".join(struct.pack("=HH", code, len(value)) + _padded(value) for code, value in options) + bytes(4)
        length = len(body) + 12
        block = struct.pack("=II", kind, length) + body + struct.pack("=I", length)
        try:
            written = os.write(self._fd, block)
        except OSError as exc:
            raise UdptunError(f"cannot write {self._path}: {exc.strerror or exc}") from exc
        if written < len(block):
            # What is written of it would be half a block.
            with suppress(OSError):
                os.ftruncate(self._fd, os.lseek(self._fd, 0, os.SEEK_CUR) - written)
            raise UdptunError(f"cannot write {self._path}: no space is left for a packet")


def _padded(value: bytes) -> bytes:
    """To 32 bits."""
    return value + bytes(-len(value) % 4)

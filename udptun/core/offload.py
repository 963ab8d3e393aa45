"""Work that the kernel can take from the datapath, and kernels that are known to get it wrong.  Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Flag, auto


class Offload(Flag):
    """Each can be switched off by its name in lower case: for all hosts in net-conf.json (`Backend.OffloadDisabled`),
    for one host with --offload-disabled."""

    VNET_HDR = auto()
    """Packets of the TUN device have a virtio header before them (since Linux 2.6.27).  The device needs it for all
    else that it can do.  It cannot be changed once the device exists."""
    TSO = auto()
    """The TUN device gives us TCP super-packets, which the datapath cuts up (since 2.6.27)."""
    USO = auto()
    """The same for UDP (since 6.2)."""
    UDP_SEGMENT = auto()
    """One send for many datagrams of one size (since 4.18)."""
    UDP_GRO = auto()
    """One receive for many datagrams of one sender (since 5.0)."""
    WRITE_TCP = auto()
    """One TUN write for many packets of a TCP flow."""
    WRITE_UDP = auto()
    """The same for UDP (since 6.2)."""
    SPREAD = auto()
    """A program of ours chooses the worker that a datagram goes to (since 4.5), not the kernel's own hash."""
    STRANGER_FILTER = auto()
    """That program drops what a flood of strangers sends (since 4.12)."""
    ECN = auto()
    """The TOS of the outer packet goes and comes with each message, for marks of congestion (since 3.13)."""


ALL = ~Offload(0)

OF_DEVICE = Offload.VNET_HDR | Offload.TSO | Offload.USO | Offload.WRITE_TCP | Offload.WRITE_UDP
"""What the TUN device does.  The socket does the rest."""

_CORRUPTING = (
    # (first release, first release without it, what it spoils): UDP_SEGMENT sends of these kernels are corrupted
    # (Linux b10b446, mended by 78effd8 and 5f17ae0).
    ((7, 0, 0), (7, 1, 5), Offload.UDP_SEGMENT),
)

_MARKS_ARE_TOLD_SINCE = {(5, 15): 159, (6, 1): 91, (6, 6): 31, (6, 8): 10}
"""Release -> the first of its stable releases whose UDP_GRO merges no datagrams of different TOS, as 6.9 and later do
(Linux 5babae7).  The TOS of the first datagram would stand for the others'."""


def names(offload: Offload) -> list[str]:
    """The names of the offloads in it, in lower case."""
    return [str(it.name).lower() for it in offload]


def parse(given: Iterable[str]) -> Offload:
    """The offloads with these names, in any letter case.  Raises ValueError with the name that is not known."""
    found = Offload(0)
    for name in given:
        if name.lower() not in names(ALL):
            raise ValueError(f"{name!r} is not one of {', '.join(names(ALL))}")
        found |= Offload[name.upper()]
    return found


def corrupted_by(release: str) -> Offload:
    """What kernels of this release (`uname -r`) are known to get wrong.  It must not be used there."""
    version = _version(release)
    bad = Offload(0)
    for first, mended, offload in _CORRUPTING:
        if version is not None and first <= version < mended:
            bad |= offload
    return bad


def tells_marks(offload: Offload, release: str) -> bool:
    """Whether with `offload` kernels of this release tell us of every mark of congestion on what peers send."""
    version = _version(release)
    if Offload.ECN not in offload or version is None:
        return False
    if Offload.UDP_GRO not in offload or version >= (6, 9):
        return True
    return version[:2] in _MARKS_ARE_TOLD_SINCE and version[2] >= _MARKS_ARE_TOLD_SINCE[version[:2]]


def _version(release: str) -> tuple[int, int, int] | None:
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    return None if match is None else (int(match[1]), int(match[2]), int(match[3] or 0))

"""What datapath processes of any build say about themselves, and the descriptors that they hand over.

`worker.py` says what HELLO is and what of it stays for good.  A control plane meets processes of its own build, of
earlier and of later ones: it must be able to adopt their descriptors and to stop them, whatever else it does not know.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

from udptun.core.tunnel import Confinement
from udptun.datapath.worker import (
    HELLO,
    HELLO_CONFINEMENT,
    HELLO_IPV6,
    HELLO_IPV6_SENDERS,
    HELLO_MAGIC,
    HELLO_QUEUES,
)

MAX_DESCRIPTORS = 253
"""In one message (SCM_MAX_FD of linux/net/scm.h).  A later build may hand over more than we know what to do with."""
MAX_HELLO_BYTES = 4096

CONFINEMENTS = (Confinement.OFF, Confinement.CAPABILITIES, Confinement.FULL)
"""In the order of the numbers that stand for them in HELLO and in csrc/confine.h."""
_CONFINEMENT = struct.Struct("=I")
_CONFINEMENTS_AT = (HELLO.size, HELLO.size + 4)
"""Where HELLO has what its process has given up, and what that was told to give up; a version before 2 or 4 is shorter.
"""
N_EVENTS = 2
_EVENTS_VERSION = 3
"""Of HELLO, from which on processes answer EVENTS."""
_IPV6_VERSION, _IPV6_AT = 5, HELLO.size + HELLO_CONFINEMENT.size
"""From which on HELLO counts the sockets of IPv6, and where."""
_QUEUES_VERSION, _QUEUES_AT = 6, _IPV6_AT + HELLO_IPV6.size
"""The same of the TUN queues beyond one a worker."""
_IPV6_SENDERS_VERSION, _IPV6_SENDERS_AT = 7, _QUEUES_AT + HELLO_QUEUES.size
"""The same of the sockets of IPv6 to send from."""

_OLD_HELLO = struct.Struct("=4sIIIIQ32s")
"""HELLO of the first builds, recognised by its size: magic, layout version, pid, 1 if active, number of workers, start
(ns), build id.  It stays for as long as an upgrade from them is promised."""


@dataclass(frozen=True, slots=True)
class Hello:
    """How a datapath process introduces itself.  `n_senders` None: all descriptors beyond the others are senders.

    `confinement` is what it has given up, `wanted_confinement` what it was told to; None when nobody knows.
    `has_events`: it answers EVENTS, with `n_ipv6` sockets, `n_more_queues` queues and `n_ipv6_senders` sockets behind
    the eventfds.
    """

    pid: int
    is_active: bool
    layout_version: int
    n_workers: int
    n_senders: int | None
    started_ns: int
    build_id: str
    confinement: Confinement | None = None
    wanted_confinement: Confinement | None = None
    has_events: bool = False
    n_ipv6: int = 0
    n_more_queues: int = 0
    n_ipv6_senders: int = 0

    @classmethod
    def parse(cls, message: bytes) -> Hello | None:
        """From a message of any build; None where the message is no HELLO."""
        if len(message) == _OLD_HELLO.size:
            magic, layout_version, pid, active, n_workers, started_ns, build = _OLD_HELLO.unpack(message)
            version, n_senders = 0, None
        elif len(message) >= HELLO.size:
            fields = HELLO.unpack_from(message)
            magic, length, version, active, n_workers, started_ns, build, pid, layout_version, n_senders = fields
            if length < HELLO.size:
                return None
        else:
            return None
        if magic != HELLO_MAGIC:
            return None
        build_id = build.decode("ascii", "replace")
        known = (pid, bool(active), layout_version, n_workers, n_senders, started_ns, build_id)
        given_up, wanted = (_confinement(message, at) for at in _CONFINEMENTS_AT)
        counts = [
            count.unpack_from(message, at)[0] if version >= since and len(message) >= at + count.size else 0
            for count, since, at in (
                (HELLO_IPV6, _IPV6_VERSION, _IPV6_AT),
                (HELLO_QUEUES, _QUEUES_VERSION, _QUEUES_AT),
                (HELLO_IPV6_SENDERS, _IPV6_SENDERS_VERSION, _IPV6_SENDERS_AT),
            )
        ]
        # One each, and no more than a message carries; or it means something else.
        n_ipv6, n_more_queues, n_ipv6_senders = (n if n <= MAX_DESCRIPTORS else 0 for n in counts)
        n_ipv6 = n_ipv6 if n_ipv6 == n_workers else 0
        return cls(*known, given_up, wanted, version >= _EVENTS_VERSION, n_ipv6, n_more_queues, n_ipv6_senders)

    @property
    def started_s(self) -> float:
        """`started_ns` as Unix time, by what the two clocks say now: it differs a little each time."""
        return time.time() - time.monotonic() + self.started_ns / 1e9


def _confinement(message: bytes, at: int) -> Confinement | None:
    """The one that stands there; None when the message is shorter, and for a number that nobody knows yet."""
    if len(message) < at + _CONFINEMENT.size:
        return None
    (number,) = _CONFINEMENT.unpack_from(message, at)
    return CONFINEMENTS[number] if number < len(CONFINEMENTS) else None


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What a datapath process works with: memory files, the lock, a TUN queue and a UDP socket a worker, senders.

    `events`: the two eventfds of the rings (`rings.new_events`); none of a build that has no rings.  `ipv6`: where the
    UDP sockets are of IPv4, one of IPv6 a worker beside them, or none; `ipv6_senders`: senders of IPv6 beside those of
    IPv4.  `tun`: the queues beyond one a worker are those of a time with more workers.
    """

    table: int
    stats: int
    lock: int
    tun: tuple[int, ...]
    udp: tuple[int, ...]
    senders: tuple[int, ...] = ()
    events: tuple[int, ...] = ()
    ipv6: tuple[int, ...] = ()
    ipv6_senders: tuple[int, ...] = ()

    @classmethod
    def from_list(cls, fds: Sequence[int], hello: Hello) -> Descriptors:
        """From the order in which HELLO carries them; what a later build has besides comes after these.

        Raises ValueError when there are fewer than HELLO says.
        """
        n = hello.n_workers
        n_senders = len(fds) - 3 - 2 * n if hello.n_senders is None else hello.n_senders
        end = 3 + 2 * n + n_senders
        if n < 1 or n_senders < 0 or len(fds) < end:
            raise ValueError(f"{len(fds)} descriptors for {n} workers and {n_senders} sockets to send from")
        table, stats, lock, *rest = fds[:end]
        return cls(table, stats, lock, tuple(rest[:n]), tuple(rest[n : 2 * n]), tuple(rest[2 * n :]))

    def as_list(self) -> list[int]:
        """All of them: first those of HELLO, in its order."""
        fixed, n = [self.table, self.stats, self.lock], len(self.udp)
        of_hello = [*fixed, *self.tun[:n], *self.udp, *self.senders]
        return [*of_hello, *self.events, *self.ipv6, *self.tun[n:], *self.ipv6_senders]

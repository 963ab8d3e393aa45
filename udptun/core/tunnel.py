"""What may be asked of the userspace tunnel: in net-conf.json for all hosts, by a flag for one.  Pure."""

from __future__ import annotations

from enum import Enum, StrEnum

MTU_MIN = 68
"""The smallest MTU, bytes, that IPv4 allows (RFC 791)."""

IPV6_MTU_MIN = 1280
"""The smallest MTU, bytes, that IPv6 allows (RFC 8200)."""

UNDERLAY_MTUS = range(MTU_MIN + 28, 65536)
"""Underlay MTUs, bytes, with which the tunnel's device has an MTU that IPv4 allows.

28 is the least overhead that a backend has: an IPv4 header of 20 and a UDP header of 8.
"""

WORKERS = range(1, 17)
"""How many datapath threads may be asked for."""

PORTS = range(1, 65536)

SOURCE_PORTS = range(1, 17)
"""How many ports datagrams may leave from."""
AS_MANY_AS_WORKERS = 0
"""In the place of a number of source ports: one for each datapath thread."""


class SourceCheck(Enum):
    """Which senders the decap side accepts.  docs/wire-format.md says which checks each value switches on."""

    OFF = "off"
    """Any outer source."""
    PEER = "peer"
    """Outer source is a peer; an inner source inside Network lies in that peer's subnet."""
    STRICT = "strict"
    """As PEER, and every inner source lies in that peer's subnet."""


class ShortcutMode(StrEnum):
    """Whether the kernel carries the packets that need no thought (docs/shortcut.md)."""

    OFF = "off"
    AUTO = "auto"
    """Where it can be had and surprises nobody; `udptun status` says why not elsewhere."""
    REQUIRE = "require"
    """No start without it, also where firewall rules name the port."""


class Confinement(StrEnum):
    """What the datapath's processes give up once they hold their descriptors."""

    OFF = "off"
    CAPABILITIES = "capabilities"
    """Every capability."""
    FULL = "full"
    """And every system call that they do without."""


def device_mtu_to(public_ip: str, here: str, mtu: int) -> int:
    """How long packets to a peer may be by the device, bytes.  `here` is this host's own underlay address.

    Where that is of IPv4, `mtu` allows for an outer header of IPv4, and one of IPv6 takes 20 bytes more.
    """
    return mtu - (20 if ":" in public_ip and ":" not in here else 0)


def default_workers(n_cpus: int) -> int:
    """How many datapath threads serve a machine of so many processors.

    With two or three processors, a second thread takes from the first one and from the pods what it adds.
    """
    return 1 if n_cpus < 4 else min(4, n_cpus // 2)

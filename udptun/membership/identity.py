"""Who this host is: among the leases (`Identity`), and across restarts (files in the state directory).

`node-id` holds the NodeID of our leases, `vtep-mac` the MAC of our VTEP, and `vtep-mac-v6` that of IPv6.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from udptun.core import atomic_file
from udptun.core.errors import ConfigError
from udptun.core.family import Family
from udptun.core.lease import Lease, host_address, is_same_host
from udptun.core.network_state import socket_address

_NODE_ID = "node-id"
_VTEP_MACS = {Family.IPV4: "vtep-mac", Family.IPV6: "vtep-mac-v6"}


@dataclass(frozen=True, slots=True)
class Node:
    """A node as its lease names it.  Two nodes that agree in all of it cannot be told apart.

    `port` 0: the lease names none, and neither does our backend.
    """

    public_ip: IPv4Address | None
    port: int
    node_id: str | None
    public_ipv6: IPv6Address | None = None

    def __str__(self) -> str:
        address = host_address(self)
        where = socket_address(address, self.port) if self.port else str(address)
        return f"{where} (node {self.node_id or 'without id'})"


@dataclass(frozen=True, slots=True)
class Identity:
    """How we know our own leases, and by what we know other nodes from theirs.

    A lease is ours when its address (see `is_same_host`) and port are; `node_id` outlives both.  `port` None: our
    backend publishes none, so there is one of us at a PublicIP, as with flannel.  A lease that names no port, as
    flannel's, has `default_port`, or ours when that is None.

    `node_name` is what the store calls us.  Where it has names, a lease is ours when it has ours, whatever else it
    says: the PublicIP in it may be an operator's.
    """

    public_ip: IPv4Address | None
    port: int | None
    node_id: str
    default_port: int | None = None
    node_name: str = ""
    public_ipv6: IPv6Address | None = None

    def named(self, node_name: str) -> Identity:
        """The same with the store's name for us, which a store that is away at the start tells later."""
        return replace(self, node_name=self.node_name or node_name)

    def node_of(self, lease: Lease) -> Node:
        """Who wrote the lease."""
        attrs = lease.attrs
        return Node(attrs.public_ip, self._port_of(lease), attrs.node_id, attrs.public_ipv6)

    def owns(self, lease: Lease) -> bool:
        """Whether the lease is ours: by name, or at our address."""
        if self.node_name and lease.node_name:
            return lease.node_name == self.node_name
        return self.is_at(lease)

    def is_at(self, lease: Lease) -> bool:
        """Whether the lease is at our address, so that packets for it would come back to us."""
        return is_same_host(lease.attrs, self) and self.port in (None, self._port_of(lease))

    def must_have_written(self, lease: Lease) -> bool:
        """Whether no other node can have written the lease; flannel's have no NodeID."""
        return self.owns(lease) and lease.attrs.node_id in (None, self.node_id)

    def is_double(self, node: Node) -> bool:
        """Whether the node has our address or our NodeID."""
        is_here = is_same_host(node, self) and self.port in (None, node.port)
        return is_here or node.node_id == self.node_id

    def _port_of(self, lease: Lease) -> int:
        return lease.attrs.port(self.default_port or self.port or 0)


def node_id(directory: Path) -> str:
    """This host's NodeID, 32 hexadecimal digits: the one in `directory`, made at the first call.

    When several processes make it at once, one wins and all return the same.  Raises ConfigError when it cannot be read
    or written, or is damaged.  It is not replaced then: with a new one our own lease would look like another host's.
    """
    path = directory / _NODE_ID
    text = _kept(path, "node id", os.urandom(16).hex())
    if len(text) != 32 or not set(text) <= set("0123456789abcdef"):
        raise ConfigError(
            f"{path} holds {text[:40]!r}, not the 32 hexadecimal digits of a node id; restore it, or delete it to "
            "become a new node (the old node's lease then stays until it expires)"
        )
    return text


def has_node_id(directory: Path) -> bool:
    """Whether a daemon with this state directory has ever held a lease."""
    return (directory / _NODE_ID).exists()


def vtep_mac(directory: Path, first: str = "", family: Family = Family.IPV4) -> str:
    """The MAC of this host's VTEP, the kernel's or the userspace one: the one in `directory`, made at the first call.

    Each address family has a VTEP of its own.
    The first call keeps `first` or, without that, makes a random one, unicast and locally administered.  It is the same
    for as long as the file is kept, because the peers have it in their neighbour tables.  Raises ConfigError when it
    cannot be read or written, or is damaged.
    """
    path = directory / _VTEP_MACS[family]
    fresh = bytearray(os.urandom(6))
    fresh[0] = fresh[0] & 0xFC | 0x02
    text = _kept(path, "VTEP's MAC", first or fresh.hex(":"))
    if not re.fullmatch(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}", text):
        raise ConfigError(
            f"{path} holds {text[:40]!r}, not a unicast MAC address; restore it, or delete it to get another one"
        )
    return text


def files(directory: Path) -> list[Path]:
    """The files in `directory` that make the host the node that it is."""
    return [directory / _NODE_ID, *(directory / name for name in _VTEP_MACS.values())]


def _kept(path: Path, what: str, fresh: str) -> str:
    """What the file holds; `fresh`, once and for all, when there is no file yet."""
    try:
        if not path.exists():
            # FileExistsError: another process was first, and its text counts.
            with suppress(FileExistsError):
                atomic_file.create(path, f"{fresh}\n")
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as exc:
        raise ConfigError(
            f"cannot keep the {what} in {path}: {exc.strerror}; --state-dir must name a directory that we may write to"
        ) from exc

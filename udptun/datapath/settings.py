"""What the control plane tells the datapath about packets and peers.  Pure; `table.py` writes it for the workers."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network

from udptun.core.family import Family
from udptun.core.network_state import IPAddress
from udptun.core.offload import ALL, Offload
from udptun.core.tunnel import SourceCheck

_VXLAN = struct.Struct(">B3xI6s6sH")
"""Flags, VNI above a reserved byte (RFC 7348 5); inner destination and source MAC, EtherType."""
_VNI_IS_VALID = 0x08
_ETHERTYPES = {4: 0x0800, 6: 0x86DD}
OUTER_HEADERS = {4: 28, 6: 48}
"""Bytes around an inner packet, by the version of IP: IPv4 header 20 (as flannel's udp_network_amd64.go has it) or IPv6
header 40, and UDP header 8.
"""


@dataclass(frozen=True, slots=True)
class Vtep:
    """What we are to VXLAN peers: the VNI of all datagrams, and our VtepMAC, 6 bytes.

    A tunnel carries one family of inner packets then: the frames that it takes are of IPv6 where it carries that.
    """

    vni: int
    mac: bytes

    def prefix(self, peer_mac: bytes, version: int) -> bytes:
        """What stands before each inner packet of this version of IP to the peer on the wire, 22 bytes."""
        return _VXLAN.pack(_VNI_IS_VALID, self.vni << 8, peer_mac, self.mac, _ETHERTYPES[version])


@dataclass(frozen=True, slots=True)
class Where:
    """What the sockets of a tunnel are bound to.  `ipv6`: an address beside `address`, which is of IPv4 then."""

    address: IPAddress
    port: int
    ipv6: IPv6Address | None = None

    def of(self, family: Family) -> IPAddress | None:
        return self.address if self.address.version == family.value else self.ipv6


@dataclass(frozen=True, slots=True)
class PacketSettings:
    """What a worker must know besides its peers.

    `mtu`: largest inner packet, bytes.  `vtep` None: inner packets travel bare, without VXLAN.  `punt_id`: ICMP id of
    the echo replies to the tunnel address that the control plane gets in place of the TUN; 0: it gets none.  `port`: of
    our UDP socket; 0: not known.  Both `network` and `own_subnet`, or neither: no IPv4 is carried; so too for IPv6.
    """

    network: IPv4Network | None
    own_subnet: IPv4Network | None
    underlay_address: IPAddress
    mtu: int
    source_check: SourceCheck
    offload: Offload = ALL
    vtep: Vtep | None = None
    punt_id: int = 0
    port: int = 0
    network_ipv6: IPv6Network | None = None
    own_subnet_ipv6: IPv6Network | None = None

    def less_for(self, remote: Remote) -> int:
        """How many bytes fewer than `mtu` a packet to there may have.

        `mtu` allows for the header of `underlay_address`'s family, and that of IPv6 is longer.
        """
        return max(0, OUTER_HEADERS[remote.address.version] - OUTER_HEADERS[self.underlay_address.version])

    @property
    def tunnel_addresses(self) -> Mapping[int, IPAddress]:
        """Those on our TUN device, by IP version: the first of each subnet of ours (flannel's choice)."""
        return {own.version: own.network_address for own in (self.own_subnet, self.own_subnet_ipv6) if own is not None}


@dataclass(frozen=True, slots=True)
class Remote:
    """Where a peer's datagrams go.

    `takes_any_source_port`: they reach it from whatever port; otherwise they must leave from ours.  `mac` is its
    VtepMAC, 6 bytes; empty where packets travel bare.  `carries_ecn`: it carries on marks of congestion.
    `takes_shortcut`: its kernel takes what ours sends, without a worker.
    """

    address: IPAddress
    port: int
    is_udptun: bool
    takes_any_source_port: bool = False
    mac: bytes = b""
    carries_ecn: bool = False
    takes_shortcut: bool = False

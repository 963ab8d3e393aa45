"""What the control plane tells the datapath about packets and peers.  Pure; `table.py` writes it for the workers."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from udptun.config import SourceCheck
from udptun.offload import ALL, Offload


@dataclass(frozen=True, slots=True)
class Settings:
    """What a worker must know besides its peers.  `mtu`: largest inner packet, bytes."""

    network: IPv4Network
    own_subnet: IPv4Network
    underlay_address: IPv4Address
    mtu: int
    source_check: SourceCheck
    offload: Offload = ALL

    @property
    def tunnel_address(self) -> IPv4Address:
        """The address on our TUN device: the first of our subnet (flannel's choice)."""
        return self.own_subnet.network_address


@dataclass(frozen=True, slots=True)
class Remote:
    """Where a peer's datagrams go."""

    address: IPv4Address
    port: int
    is_udptun: bool

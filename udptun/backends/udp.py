"""The udp backend: flannel's wire format through a TUN device (backend/udp/udp_network_amd64.go).  Pure."""

from __future__ import annotations

from ipaddress import IPv4Network

from udptun.backends.base import DesiredAddress, DesiredLink, DesiredRoute, DesiredState, Sysctl
from udptun.netstate import RouteType

_WORST_METRIC = 0xFFFFFFFF
_MIN_TX_QUEUE_LEN = 500
"""What the kernel gives a TUN device (TUN_READQ_SIZE); packets wait there while a dead datapath is replaced."""


def desired(network: IPv4Network, own_subnet: IPv4Network, mtu: int, tun_name: str) -> DesiredState:
    """The device with `own_subnet`'s first address, and the routes that lead `network` into it.

    `mtu` is the largest inner packet, bytes.  The address is a /32, as flannel's since 0.11: with the network's own
    length the kernel would add a route and a broadcast address of its own.
    """
    link = DesiredLink(
        tun_name,
        mtu,
        _MIN_TX_QUEUE_LEN,
        (
            # Our ICMP errors come out of the device with our own address as their source; the kernel drops such
            # packets as martians otherwise (fib_validate_source).
            Sysctl(f"net/ipv4/conf/{tun_name}/accept_local", "1"),
            # The tunnel carries IPv4 alone: without this the kernel greets the peers with router solicitations.
            Sysctl(f"net/ipv6/conf/{tun_name}/disable_ipv6", "1", is_optional=True),
        ),
    )
    return DesiredState(
        links=(link,),
        addresses=(DesiredAddress(tun_name, own_subnet.network_address, 32),),
        routes=(
            # When the device is down or gone its route goes with it; this one then keeps pod packets from following
            # the default route in clear text.
            DesiredRoute(network, type=RouteType.UNREACHABLE, metric=_WORST_METRIC),
            DesiredRoute(network, tun_name),
        ),
    )

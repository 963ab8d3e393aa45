"""Other ways from pod to pod in the same lab, beside the daemon's, so that all are measured interleaved.

Each way has an address plan and, in every pod, a link of its own, with the MTU that way has in practice:

    plain routing   10.250.<host>.<pod + 1>   routes between the hosts, as host-gw has them: the ceiling
    kernel vxlan    10.251.<host>.<pod + 1>   static routes, neighbours and fdb, as flannel's vxlan backend has them
    a tunnel's      <its network>             a layer-3 device that some other tunnel program has made in every host

By IPv6 the first two are ways of their own, with fd00:250:0:<host>::<pod + 1> and fd00:251:0:<host>::<pod + 1>.  All
are set up for the hosts and pods that the lab has at the moment of the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network

from udptun.core.family import Family
from udptun.core.network_state import IPAddress, IPNetwork
from udptun.lab.errors import LabError
from udptun.lab.host import Host, Pod
from udptun.lab.topology import Lab

_VXLAN_OVERHEAD = {Family.IPV4: 50, Family.IPV6: 70}
"""Outer IPv4 20 or IPv6 40, UDP 8, VXLAN 8, inner Ethernet 14, bytes."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way for packets; `mtu` in bytes."""

    name: str
    network: IPNetwork
    mtu: int

    def gateway(self, host: Host) -> IPv4Interface | IPv6Interface:
        first = int(self.network.network_address)
        if self.network.version == 4:
            return IPv4Interface((first + (host.index << 8) + 1, 24))
        return IPv6Interface((first + (host.index << 64) + 1, 64))

    def address(self, pod: Pod) -> IPAddress:
        """Where other pods reach `pod` on this way."""
        return self.gateway(pod.host).network[1 + pod.number]


def plain_routing(lab: Lab, family: Family = Family.IPV4) -> Way:
    """Connect all pods by plain routes from host to host."""
    if family is Family.IPV4:
        way = Way("plain", IPv4Network("10.250.0.0/16"), lab.underlay_mtu)
    else:
        way = Way("plain-v6", IPv6Network("fd00:250::/48"), lab.underlay_mtu)
    _attach_pods(lab, way)
    for host, peer in _pairs(lab):
        host.machine.at().ip(f"route add {way.gateway(peer).network} via {peer.underlay_of(family)} dev eth0")
    return way


def kernel_vxlan(lab: Lab, family: Family = Family.IPV4, port: int = 8472, vni: int = 1) -> Way:
    """Connect all pods by the kernel's VXLAN, each family over its own.  Raises LabError where the kernel has none."""
    mtu = lab.underlay_mtu - _VXLAN_OVERHEAD[family]
    if family is Family.IPV4:
        way, vtep = Way("vxlan", IPv4Network("10.251.0.0/16"), mtu), f"vxlan.{vni}"
    else:
        way, vtep = Way("vxlan-v6", IPv6Network("fd00:251::/48"), mtu), f"vxlan-v6.{vni}"
    for host in lab.hosts:
        try:
            host.machine.at().ip(
                f"link add {vtep} mtu {way.mtu} address {_vtep_mac(host)}"
                f" type vxlan id {vni} dstport {port} local {host.underlay_of(family)} dev eth0 nolearning",
                f"addr add {_tunnel_address(way, host)} dev {vtep}",
                f"link set {vtep} up",
            )
        except LabError as exc:
            raise LabError(f"no kernel vxlan to compare with: {exc}") from exc
    _attach_pods(lab, way)
    for host, peer in _pairs(lab):
        subnet = way.gateway(peer).network
        host.machine.at().ip(
            f"neigh replace {subnet.network_address} lladdr {_vtep_mac(peer)} dev {vtep} nud permanent",
            f"route add {subnet} via {subnet.network_address} dev {vtep} onlink",
        )
        remote = str(peer.underlay_of(family))
        host.run(["bridge", "fdb", "append", _vtep_mac(peer), "dev", vtep, "dst", remote, "self", "permanent"])
    return way


def over_device(lab: Lab, name: str, device: str, network: IPNetwork, mtu: int) -> Way:
    """Connect all pods through the layer-3 `device` that a tunnel program has made in every host.

    `network` is a /16, of IPv6 a /48, that nothing else in the lab uses.  `name`, at most 8 letters, is for links and
    bridges beside `device`, which gets its MTU (bytes), address and routes here, as flannel0 does from flannel.
    """
    way = Way(name, network, mtu)
    for host in lab.hosts:
        host.machine.at().ip(
            f"link set {device} mtu {mtu} up",
            f"addr replace {_tunnel_address(way, host)} dev {device}",
        )
    _attach_pods(lab, way)
    for host, peer in _pairs(lab):
        host.machine.at().ip(f"route add {way.gateway(peer).network} dev {device}")
    return way


def _attach_pods(lab: Lab, way: Way) -> None:
    for host in lab.hosts:
        gateway = way.gateway(host)
        for pod in host.pods:
            host.attach(pod, f"{way.name}0", way.name, gateway, way.address(pod), way.mtu)
            pod.ip(f"route add {way.network} via {gateway.ip} dev {way.name} src {way.address(pod)}")


def _tunnel_address(way: Way, host: Host) -> str:
    """That of the host's device, as flannel gives it."""
    subnet = way.gateway(host).network
    # The kernel looks for no other host that has it: nobody would answer.
    return f"{subnet.network_address}/{subnet.max_prefixlen}{' nodad' * (subnet.version == 6)}"


def _pairs(lab: Lab) -> list[tuple[Host, Host]]:
    return [(host, peer) for host in lab.hosts for peer in lab.hosts if peer is not host]


def _vtep_mac(host: Host) -> str:
    return f"02:00:00:00:00:{host.index:02x}"

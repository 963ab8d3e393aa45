"""Other ways from pod to pod in the same lab, beside the daemon's, so that all are measured interleaved.

Each way has an address plan and, in every pod, a link of its own, with the MTU that way has in practice:

    plain routing   10.250.<host>.<pod + 1>   routes between the hosts, as host-gw has them: the ceiling
    kernel vxlan    10.251.<host>.<pod + 1>   static routes, neighbours and fdb, as flannel's vxlan backend has them
    a tunnel's      <its network>             a layer-3 device that some other tunnel program has made in every host

All are set up for the hosts and pods that the lab has at the moment of the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from udptun.lab.errors import LabError
from udptun.lab.host import Host, Pod
from udptun.lab.topology import Lab

_VXLAN_OVERHEAD = 50
"""Outer IPv4 20, UDP 8, VXLAN 8, inner Ethernet 14, bytes."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way for packets; `mtu` in bytes."""

    name: str
    network: IPv4Network
    mtu: int

    def gateway(self, host: Host) -> IPv4Interface:
        base = int(self.network.network_address) + (host.index << 8)
        return IPv4Interface((base + 1, 24))

    def address(self, pod: Pod) -> IPv4Address:
        """Where other pods reach `pod` on this way."""
        return self.gateway(pod.host).network[1 + pod.number]


def plain_routing(lab: Lab) -> Way:
    """Connect all pods by plain routes from host to host."""
    way = Way("plain", IPv4Network("10.250.0.0/16"), lab.underlay_mtu)
    _attach_pods(lab, way)
    for host, peer in _pairs(lab):
        host.machine.at().ip(f"route add {way.gateway(peer).network} via {peer.underlay_address} dev eth0")
    return way


def kernel_vxlan(lab: Lab, port: int = 8472, vni: int = 1) -> Way:
    """Connect all pods by the kernel's VXLAN.  Raises LabError where the kernel has none."""
    way = Way("vxlan", IPv4Network("10.251.0.0/16"), lab.underlay_mtu - _VXLAN_OVERHEAD)
    vtep = f"vxlan.{vni}"
    for host in lab.hosts:
        try:
            host.machine.at().ip(
                f"link add {vtep} mtu {way.mtu} address {_vtep_mac(host)}"
                f" type vxlan id {vni} dstport {port} local {host.underlay_address} dev eth0 nolearning",
                f"addr add {way.gateway(host).network.network_address}/32 dev {vtep}",
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
        remote = str(peer.underlay_address)
        host.run(["bridge", "fdb", "append", _vtep_mac(peer), "dev", vtep, "dst", remote, "self", "permanent"])
    return way


def over_device(lab: Lab, name: str, device: str, network: IPv4Network, mtu: int) -> Way:
    """Connect all pods through the layer-3 `device` that a tunnel program has made in every host.

    `network` is a /16 that nothing else in the lab uses.  `name`, at most 8 letters, is for links and bridges beside
    `device`, which gets its MTU (bytes), address and routes here, as flannel0 does from flannel.
    """
    way = Way(name, network, mtu)
    for host in lab.hosts:
        host.machine.at().ip(
            f"link set {device} mtu {mtu} up",
            f"addr replace {way.gateway(host).network.network_address}/32 dev {device}",
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


def _pairs(lab: Lab) -> list[tuple[Host, Host]]:
    return [(host, peer) for host in lab.hosts for peer in lab.hosts if peer is not host]


def _vtep_mac(host: Host) -> str:
    return f"02:00:00:00:00:{host.index:02x}"

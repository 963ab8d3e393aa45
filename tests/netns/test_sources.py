"""Which sources a host's datagrams and packets have: inside none of the receiver's addresses.

pod h1/p1 -- cni0 [h1] eth0 -- underlay -- eth0 [h2] cni0 -- pod h2/p1
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from traffic import read_status, socket_in

from tests.packets import udp
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

FOLLOWS_S = 10
"""A change is followed within a fraction of a second; the machine may be busy."""

BACKENDS = {"udp": {"Type": "udp"}, "vtep": {"Type": "vxlan", "Userspace": True}}


@contextmanager
def lab_of(backend: str) -> Iterator[Lab]:
    """Two hosts, whose daemons must not have printed a traceback by the end."""
    net_conf = {"Network": "10.244.0.0/16", "Backend": BACKENDS[backend]}
    with Lab(f"s{os.getpid()}", n_hosts=2, net_conf=net_conf) as lab:
        yield lab
        for host in lab.hosts:
            assert "Traceback" not in host.daemon_log()


def start(host: Host, public_ip: object) -> None:
    host.start_daemon(["--iface=eth0", f"--public-ip={public_ip}"])
    host.wait_ready()


@pytest.fixture
def refused() -> Iterator[Callable[[str], bool]]:
    """Tells whether h2 refuses a packet that h1 sends from such a source, although its device accepts local ones."""
    with lab_of("udp") as lab:
        one, two = lab.hosts
        for host in lab.hosts:
            start(host, host.underlay_address)
        wait_until("a peer", lambda: len(read_status(two)["peers"]) == 1, FOLLOWS_S)
        with socket_in(one, socket.SOCK_DGRAM) as sender:
            sender.bind((str(one.underlay_address), 0))

            def is_refused(source: str) -> bool:
                before = read_status(two)["counters"]
                sender.sendto(udp(source, str(two.subnet[2])), (str(two.underlay_address), 8285))
                now = before
                while now["decap_packets"] == before["decap_packets"]:
                    now = read_status(two)["counters"]
                return bool(now["decap_drop_source_own"] > before["decap_drop_source_own"])

            is_refused.host = two  # type: ignore[attr-defined]
            yield is_refused


def test_packets_from_any_address_of_the_receiver_are_refused_as_the_addresses_come_and_go(
    refused: Callable[[str], bool],
) -> None:
    """Only the underlay's address was refused; accept_local let the others in, as if they came from the host."""
    two: Host = refused.host  # type: ignore[attr-defined]
    ip = two.machine.at().ip
    others = {"198.51.100.9": "dev lo", "198.51.100.10": "dev eth0"}
    assert refused(str(two.underlay_address))
    assert not any(map(refused, others))
    for address, where in others.items():
        ip(f"address add {address}/32 {where}")
    ip("route add local 198.51.100.32/28 dev lo")
    for address in (*others, "198.51.100.33", "198.51.100.47"):
        wait_until(f"packets from {address} to be refused", lambda it=address: refused(it), FOLLOWS_S)
    assert not refused("198.51.100.48")
    # A daemon that comes new to a datapath that runs knows them all before it writes its first table.
    assert two.stop_daemon() == 0
    start(two, two.underlay_address)
    assert all(map(refused, others))
    for address, where in others.items():
        ip(f"address del {address}/32 {where}")
    ip("route del local 198.51.100.32/28 dev lo")
    for address in (*others, "198.51.100.33"):
        wait_until(f"packets from {address} to be let in", lambda it=address: not refused(it), FOLLOWS_S)


def test_thousands_of_addresses_are_refused_and_the_daemon_goes_on_answering(refused: Callable[[str], bool]) -> None:
    """kube-proxy in ipvs mode gives each host the addresses of all services.  One look at 10,000 took half a second."""
    two: Host = refused.host  # type: ignore[attr-defined]
    addresses = [f"10.{96 + (i >> 8)}.{i & 255}.1" for i in range(5000)]
    batch = "".join(f"address add {address}/32 dev lo\n" for address in addresses)
    two.run(["ip", "-batch", "-"], input=batch)
    for address in (addresses[0], addresses[2500], addresses[-1]):
        wait_until(f"packets from {address} to be refused", lambda it=address: refused(it), FOLLOWS_S)
    assert not refused("10.95.0.1")
    assert read_status(two)["problems"] == []

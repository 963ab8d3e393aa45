"""Datagrams of the tunnel inside the tunnel; and that nobody gets more from us than he sends.

The cases that no lease explains are in cases.py.
"""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from tests.datapath.cases import DECAP, DECAP_VXLAN, GOOD_DECAP
from tests.datapath.harness import Datapath, FastDatapath, Message
from tests.packets import LOCALS, NEAR, NEAR_POD, NO_VNET_HDR, OWN, POD, PORT, UNDERLAY, WIDE, ipv4, udp, udp_segment

LEAST_ANSWER = 56
"""IP header, ICMP header, and of what is quoted the IP header and 8 bytes more (RFC 1122 3.2.2)."""


def to_port(source: str, destination: str, port: int) -> bytes:
    return ipv4(source, destination, udp_segment(source, destination, bytes(100), ports=(40000, port)))


def test_no_datagram_of_the_tunnel_is_carried_to_a_peer_that_leases_another_ones_address(datapath: Datapath) -> None:
    """It came back, 28 bytes longer each time, until it was longer than the path: some 50 for each packet of a pod."""
    near, wide = (next(peer for peer in datapath.table.peers if str(peer.remote[0]) == ip) for ip in (NEAR, WIDE))
    # WIDE leases an address of NEAR.
    datapath.set_overlay("127.0.0.0/8", "127.1.1.0/24", [("127.0.0.0/24", wide), ("127.2.0.0/24", near)])
    for source, port in (("127.1.1.5", PORT), ("127.1.1.5", wide.remote[1]), (UNDERLAY, near.remote[1])):
        assert datapath.encap(NO_VNET_HDR + to_port(source, NEAR, port)).counter == "encap_drop_loop"
    assert datapath.encap(NO_VNET_HDR + to_port("127.1.1.5", NEAR, 53)).counter == "encap_sent"
    assert datapath.encap(NO_VNET_HDR + to_port("127.1.1.5", "127.0.0.77", PORT)).counter == "encap_sent"


def test_a_peers_packet_to_our_own_socket_goes_nowhere(datapath: Datapath) -> None:
    """What is in it would have come from an address of the tunnel, and not from a peer's."""
    datapath.configure(local_addresses=frozenset(map(IPv4Address, (UNDERLAY, *LOCALS, OWN))))
    assert datapath.decap(to_port(NEAR_POD, OWN, PORT), NEAR).counter == "decap_drop_loop"
    assert datapath.decap(to_port(NEAR_POD, OWN, PORT + 1), NEAR).counter == "decap_delivered"
    assert datapath.decap(to_port(NEAR_POD, POD, PORT), NEAR).counter == "decap_delivered"


@pytest.mark.parametrize("check", ["peer", "strict", "off"])
def test_nobody_gets_more_from_us_than_he_sends(fast: FastDatapath, check: str) -> None:
    """One datagram at most, to a peer, no longer than what came, but for the least that an ICMP error has to quote.

    The harness fails when anything comes out that no counter announces; test_refusals.py looks at strangers' sockets.
    """
    fast.configure(source_check=check)
    peers = {peer.remote for peer in fast.table.peers}
    cases = [(case.packet, case.source) for case in DECAP] + list(GOOD_DECAP.values())
    short = [(ipv4(NEAR_POD, POD, bytes(n), ttl=1), NEAR) for n in (0, 1, 7, 8, 35, 36, 37, 500, 547, 548, 556, 600)]
    options = [(ipv4(NEAR_POD, POD, bytes(n), ttl=1, options=b"\1" * 40), NEAR) for n in (0, 8, 100, 600)]
    prefix_len = fast.table.prefix_len
    answered = 0
    for packet, source in [*cases, *short, *options]:
        batch = fast.decap_batch([(packet, source)])
        sends = [(remote, payload) for remote, payloads in batch.sends.items() for payload in payloads]
        assert len(sends) <= 1
        for remote, payload in sends:
            assert remote in peers
            header_len = (packet[0] & 15) * 4
            assert len(payload) <= max(len(packet), LEAST_ANSWER - 20 + header_len)
            answered += 1
    assert answered > len(short)
    if prefix_len:
        for case in DECAP_VXLAN:
            assert fast.decap_wire([Message(case.packet, case.source)]).sends == {}


def test_what_is_sent_over_the_underlay_goes_to_peers_alone(fast: FastDatapath) -> None:
    """Whatever a pod sends, and to wherever: what no peer leases leaves as an answer to the pod, or not at all."""
    for destination in ("0.0.0.0", "127.0.0.99", "224.0.0.1", "255.255.255.255", "198.51.100.77", OWN, UNDERLAY):
        batch = fast.encap_batch([NO_VNET_HDR + udp(POD, destination)])
        assert batch.sends == {}

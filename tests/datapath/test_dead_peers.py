"""Packets to a peer that was found dead, over both implementations; and how a worker learns that it is back."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

from tests.datapath.harness import Datapath, FastDatapath
from tests.packets import (
    NARROW,
    NEAR,
    NEAR_POD,
    NO_VNET_HDR,
    OWN,
    POD,
    TWIN,
    TWIN_OTHER_POD,
    TWIN_POD,
    icmp_answer,
    icmp_message,
    ipv4,
    stepped,
    tcp_segment,
    udp,
    vnet_hdr,
)
from tests.reference import Outcome
from udptun.datapath.stats import PeerTraffic

OUT = udp(POD, NEAR_POD, b"to a dead peer")
IN = udp(NEAR_POD, POD, b"from it")


def kill(datapath: Datapath, pod: str = NEAR_POD) -> None:
    """Say that the peer which leases `pod` is dead."""
    peers = tuple(replace(it, is_dead=IPv4Address(pod) in it.subnet) for it in datapath.table.peers)
    datapath.configure(peers=peers)


def refused(packet: bytes) -> Outcome:
    answer = icmp_answer(3, 1, packet, source=OWN)
    return Outcome("encap_drop_dead", writes=(NO_VNET_HDR + answer,), icmp="icmp_sent")


def test_sender_learns_that_the_host_cannot_be_reached(datapath: Datapath) -> None:
    kill(datapath)
    for packet in (OUT, udp(POD, NEAR_POD, ttl=1), ipv4(POD, NEAR_POD, bytes(1480), flags="DF")):
        assert datapath.encap(NO_VNET_HDR + packet) == refused(packet)
    error = ipv4(POD, NEAR_POD, icmp_message(3, 1, data=bytes(28)), protocol=1)
    assert datapath.encap(NO_VNET_HDR + error) == Outcome("encap_drop_dead", icmp="icmp_suppressed")


def test_super_packet_is_refused_once(datapath: Datapath) -> None:
    kill(datapath)
    packet = ipv4(POD, NEAR_POD, tcp_segment(POD, NEAR_POD, bytes(3000)), protocol=6)
    header = vnet_hdr(flags=1, gso_type=1, hdr_len=40, gso_size=1000, start=20, offset=16)
    batch = datapath.encap_batch([header + packet])
    assert batch.counts == {"encap_packets": 3, "encap_drop_dead": 3, "icmp_sent": 1}
    assert len(batch.writes) == 1


def test_other_peers_are_reached(datapath: Datapath) -> None:
    """Also another lease of the same host: each has a tunnel address of its own."""
    kill(datapath, TWIN_POD)
    assert datapath.encap(NO_VNET_HDR + udp(POD, TWIN_POD)).counter == "encap_drop_dead"
    assert datapath.encap(NO_VNET_HDR + udp(POD, TWIN_OTHER_POD)).counter == "encap_sent"
    assert datapath.encap(NO_VNET_HDR + OUT).counter == "encap_sent"


def test_packets_pass_at_once_when_something_comes_from_a_dead_peer(fast: FastDatapath) -> None:
    """Whichever worker has received it, and before the control plane knows."""
    assert fast.decap(IN, NEAR).counter == "decap_delivered"
    kill(fast)
    assert fast.encap(NO_VNET_HDR + OUT).counter == "encap_drop_dead"
    # Not from it, or not taken.
    fast.decap(udp(TWIN_POD, POD), TWIN)
    fast.decap(IN, NARROW)
    fast.decap(udp(NEAR_POD, POD, ttl=1), NEAR)
    assert fast.encap(NO_VNET_HDR + OUT).counter == "encap_drop_dead"
    fast.renew_worker(3)
    assert fast.decap(IN, NEAR).counter == "decap_delivered"
    fast.renew_worker(0)
    assert fast.encap(NO_VNET_HDR + OUT).sends == ((fast.table.peers[0].remote, stepped(OUT)),)
    # It was heard, so it is dead only with another verdict.
    kill(fast)
    assert fast.encap(NO_VNET_HDR + OUT).counter == "encap_drop_dead"


def test_traffic_is_what_has_come_and_gone_since_the_last_look(fast: FastDatapath) -> None:
    fast.encap_batch([NO_VNET_HDR + OUT] * 3)
    traffic = PeerTraffic(fast.stats)
    assert traffic.look(6) == {}
    fast.encap_batch([NO_VNET_HDR + OUT] * 2)
    fast.decap_batch([(IN, NEAR)] * 5 + [(udp(TWIN_POD, POD), TWIN)])
    assert traffic.look(6) == {1: (2, 5), 3: (0, 1)}
    assert traffic.look(6) == {}
    # Another worker, and one row more or fewer than before.
    fast.renew_worker(2)
    fast.encap_batch([NO_VNET_HDR + OUT])
    assert traffic.look(70) == {}, "what a worker has counted before it is looked at the first time"
    fast.encap_batch([NO_VNET_HDR + OUT])
    assert traffic.look(2) == {1: (1, 0)}
    # The counters begin anew with another peer.
    fast.stats.clear_peers([1])
    fast.encap_batch([NO_VNET_HDR + OUT])
    assert traffic.look(70) == {1: (1, 0)}

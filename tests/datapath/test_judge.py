"""What `Judge` says of a packet is what a worker does with it: every case of cases.py and ipv6_cases.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from ipaddress import ip_address

import pytest

from tests.datapath import cases, ipv6_cases
from tests.datapath.cases import Bad
from tests.datapath.harness import FastDatapath, skip_unless_built
from tests.packets import NARROW_MTU, NARROW_POD, NEAR_POD, NO_VNET_HDR, POD, ipv4, udp
from udptun.datapath.judge import Judge


@pytest.fixture(params=["udp", "udp-ipv6", "vxlan", "vxlan-ipv6"])
def datapath(request: pytest.FixtureRequest) -> Iterator[FastDatapath]:
    skip_unless_built()
    encapsulation, _, ipv6 = request.param.partition("-")
    with FastDatapath(is_vxlan=encapsulation == "vxlan", has_ipv6=bool(ipv6)) as datapath:
        yield datapath


def both(of_ipv4: Iterable[Bad], of_ipv6: Iterable[Bad]) -> list[Bad]:
    return [*of_ipv4, *of_ipv6]


def packets(of_ipv4: Mapping[str, bytes], of_ipv6: Mapping[str, bytes]) -> list[bytes]:
    return [*of_ipv4.values(), *of_ipv6.values()]


def test_packet_of_a_pod_would_end_where_a_worker_ends_it(datapath: FastDatapath) -> None:
    judge = datapath.judge()
    bad = [case.packet for case in both(cases.ENCAP, ipv6_cases.ENCAP)]
    for packet in [*bad, *packets(cases.GOOD_ENCAP, ipv6_cases.GOOD_ENCAP)]:
        said = judge.encap(packet)
        assert datapath.encap(NO_VNET_HDR + packet).counter == said.counter, packet.hex()


@pytest.mark.parametrize("source_check", ["peer", "strict", "off"])
def test_packet_of_a_peer_would_end_where_a_worker_ends_it(datapath: FastDatapath, source_check: str) -> None:
    datapath.configure(source_check=source_check)
    judge = datapath.judge()
    bad = [(case.packet, case.source) for case in both(cases.DECAP, ipv6_cases.DECAP)]
    for packet, source in [*bad, *cases.GOOD_DECAP.values(), *ipv6_cases.GOOD_DECAP.values()]:
        counter = datapath.decap(packet, source).counter
        port = datapath.socket_of(source).getsockname()[1]
        assert judge.decap(packet, ip_address(source), port).counter == counter, packet.hex()


@pytest.mark.parametrize("datapath", ["udp", "vxlan"], indirect=True)
def test_judge_sees_each_table_as_soon_as_it_is_published(datapath: FastDatapath) -> None:
    judge, packet = datapath.judge(), udp(POD, NEAR_POD)
    assert judge.encap(packet).counter == "encap_sent"
    dead = tuple(replace(it, is_dead=ip_address(NEAR_POD) in it.subnet) for it in datapath.table.peers)
    datapath.configure(peers=dead)
    said = judge.encap(packet)
    assert said.counter == "encap_drop_dead"
    assert said.peer is not None
    assert said.peer.is_dead
    assert ip_address(NEAR_POD) in said.peer.subnet


@pytest.mark.parametrize("datapath", ["udp", "vxlan"], indirect=True)
def test_judge_says_who_gets_the_packet_and_how_long_it_may_be(datapath: FastDatapath) -> None:
    judge = datapath.judge()
    said = judge.encap(ipv4(POD, NARROW_POD, bytes(NARROW_MTU), flags="DF"))
    assert said.peer is not None
    peer = next(it for it in datapath.table.peers if it.subnet == said.peer.subnet)
    assert said.counter == "encap_drop_too_big"
    assert (said.peer.address, said.peer.port) == peer.remote
    assert said.peer.mtu == NARROW_MTU


def test_nothing_is_counted_or_changed(datapath: FastDatapath) -> None:
    before, judge = datapath.counters, datapath.judge()
    packet = udp(POD, NEAR_POD)
    kept = bytes(bytearray(packet))
    for _ in range(3):
        judge.encap(packet)
        judge.decap(packet, ip_address("127.0.0.9"), 1)
    assert packet == kept
    assert datapath.counters == before


def test_before_a_table_is_published_there_is_nothing_to_ask() -> None:
    skip_unless_built()
    from udptun.datapath.stats import Stats
    from udptun.datapath.table import TableWriter

    table, stats = TableWriter.create(), Stats.create()
    try:
        with pytest.raises(ValueError, match="no table"):
            Judge(table, stats).encap(udp(POD, NEAR_POD))
    finally:
        table.close()
        stats.close()

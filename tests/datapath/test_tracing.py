"""What the workers show of packets while somebody watches: which ones, how much of them, and where they have ended."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from ipaddress import ip_network

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.datapath import cases, ipv6_cases
from tests.datapath.harness import FastDatapath, Message, skip_unless_built
from tests.datapath.test_equivalence import ANY_PACKET
from tests.datapath.test_ipv6_equivalence import mixed
from tests.datapath.test_learned_sources import SEQUENCE, answer
from tests.namespace import namespace, requires_netns
from tests.packets import (
    DEAF_POD,
    DEAF_POD6,
    GSO_TCPV4,
    MTU,
    NARROW,
    NARROW_POD,
    NEAR,
    NEAR_POD,
    NEAR_POD6,
    NEEDS_CSUM,
    NO_VNET_HDR,
    OWN,
    OWN6,
    PARTIAL,
    POD,
    POD6,
    PORT,
    STRANGER,
    UNLEASED,
    icmp_message,
    icmpv6_message,
    ipv4,
    ipv6,
    tcp,
    udp,
    udp_segment,
    vnet_hdr,
)
from tests.reference_ip import IPV4_HDR_MIN, IPV6_HDR_LEN, TCP, UDP, read_header
from udptun._fastpath import COUNTERS, LAYOUT
from udptun.core.live_trace import SNAP_LEN_MAX, LiveTraceRequest
from udptun.datapath.tracing import Traced, Tracer

ALL = LiveTraceRequest(None, None, None, None, 1)
VALID_S = 60.0
SLOTS, PUNTS = LAYOUT["trace_slots"], LAYOUT["ring_slots"]
ID = 0x5EED


@pytest.fixture(params=["udp", "udp-ipv6", "vxlan", "vxlan-ipv6"])
def datapath(request: pytest.FixtureRequest) -> Iterator[FastDatapath]:
    skip_unless_built()
    encapsulation, _, ipv6 = request.param.partition("-")
    with FastDatapath(is_vxlan=encapsulation == "vxlan", has_ipv6=bool(ipv6)) as datapath:
        # A worker that has never run has no ring.
        datapath.turn()
        yield datapath


def tracer(datapath: FastDatapath, asked: LiveTraceRequest = ALL, valid_s: float = VALID_S) -> Tracer:
    found = Tracer(datapath.stats)
    found.start(asked, valid_s)
    return found


def watching(datapath: FastDatapath) -> Tracer:
    """Of a worker that is to be watched for long: all packets, as much of them as can be shown."""
    datapath.turn()
    return tracer(datapath, replace(ALL, snap_len=SNAP_LEN_MAX), valid_s=1e6)


def ends_shown(watch: Tracer) -> dict[str, int]:
    """How many packets have ended in each counter since the last time, by what is shown."""
    found: Counter[str] = Counter()
    while more := watch.take():
        for it in more:
            # A super-packet from a peer is one datagram.
            n = it.n_segments if it.is_outgoing else 1
            if it.n_dropped == 0:
                found[it.counter] += n
            else:
                found[it.counter] += min(n, it.n_dropped)
                found["encap_sent"] += max(n - it.n_dropped, 0)
    return {name: n for name, n in found.items() if n}


def ends(counts: dict[str, int]) -> dict[str, int]:
    """The same by the counters that have moved."""
    return {name: n for name, n in counts.items() if not name.startswith("icmp_") and not name.endswith("_packets")}


def words(source: str, destination: str, *more: str, **flags: object) -> LiveTraceRequest:
    return LiveTraceRequest.from_words(source, destination, *more, n_packets="1", **flags)  # type: ignore[arg-type]


def packets(of_ipv4: Iterable[bytes], of_ipv6: Iterable[bytes]) -> list[bytes]:
    return [*of_ipv4, *of_ipv6]


# ------------------------------------------------------------------------------------------------------ the ends


def bad(of_ipv4: Iterable[cases.Bad], of_ipv6: Iterable[cases.Bad]) -> list[cases.Bad]:
    return [*of_ipv4, *of_ipv6]


@pytest.mark.parametrize("is_drops_alone", [False, True])
def test_each_packet_of_a_pod_is_shown_with_its_end(datapath: FastDatapath, is_drops_alone: bool) -> None:
    watch = tracer(datapath, replace(ALL, is_drops_alone=is_drops_alone, snap_len=SNAP_LEN_MAX))
    refused = [udp(POD, DEAF_POD), udp(POD6, DEAF_POD6)]
    for packet in [
        *(case.packet for case in bad(cases.ENCAP, ipv6_cases.ENCAP)),
        *packets(cases.GOOD_ENCAP.values(), ipv6_cases.GOOD_ENCAP.values()),
        *refused,
    ]:
        before = datapath.counters
        outcome = datapath.encap(NO_VNET_HDR + packet)
        check(watch.take(), outcome.counter, packet, before, datapath.counters, is_drops_alone=is_drops_alone)


@pytest.mark.parametrize("is_drops_alone", [False, True])
def test_each_packet_of_a_peer_is_shown_with_its_end(datapath: FastDatapath, is_drops_alone: bool) -> None:
    watch = tracer(datapath, replace(ALL, is_drops_alone=is_drops_alone, snap_len=SNAP_LEN_MAX))
    datapath.configure(punt_id=ID)
    reply = icmp_message(0, rest=ID.to_bytes(2) + bytes(2))
    reply6 = icmpv6_message(NEAR_POD6, OWN6, 129, rest=ID.to_bytes(2) + bytes(2))
    punted = [
        (ipv4(NEAR_POD, OWN, reply, protocol=1), NEAR),
        (ipv6(NEAR_POD6, OWN6, reply6, protocol=58), NEAR),
    ]
    seen: set[str] = set()
    for packet, source in [
        *((case.packet, case.source) for case in bad(cases.DECAP, ipv6_cases.DECAP)),
        *(*cases.GOOD_DECAP.values(), *ipv6_cases.GOOD_DECAP.values()),
        *punted,
    ]:
        before = datapath.counters
        outcome = datapath.decap(packet, source)
        seen.add(outcome.counter)
        found = watch.take()
        check(found, outcome.counter, packet, before, datapath.counters, is_drops_alone=is_drops_alone)
        for it in found:
            assert not it.is_outgoing
            assert (str(it.outer), it.outer_port) == datapath.socket_of(source).getsockname()
    assert "decap_punted" in seen


def check(
    found: Sequence[Traced],
    counter: str,
    packet: bytes,
    before: dict[str, int],
    after: dict[str, int],
    *,
    is_drops_alone: bool,
) -> None:
    """That of one packet which has ended in `counter` there is what there should be."""
    is_drop = counter not in ("encap_sent", "decap_delivered", "decap_punted")
    if is_drops_alone and not is_drop:
        assert found == []
        return
    assert [it.counter for it in found] == [counter], packet.hex()
    (it,) = found
    assert it.is_answered == (after["icmp_sent"] > before["icmp_sent"])
    assert it.n_segments == 1 or it.length > MTU
    assert it.n_dropped == (it.n_segments if is_drop else 0)
    assert abs(time.monotonic_ns() - it.time_ns) < 60 * 10**9
    assert packet.startswith(it.packet), "as it came"
    # What is behind a packet is cut off.
    assert len(it.packet) == min(it.length, SNAP_LEN_MAX) <= len(packet)


@pytest.mark.parametrize("datapath", ["udp", "vxlan"], indirect=True)
def test_who_gets_or_sends_the_packet_is_shown(datapath: FastDatapath) -> None:
    watch = tracer(datapath)
    datapath.encap(NO_VNET_HDR + udp(POD, NARROW_POD))
    datapath.encap(NO_VNET_HDR + udp(POD, UNLEASED))
    datapath.decap(udp(NEAR_POD, POD), STRANGER)
    sent, lost, strangers = watch.take()
    peers = [datapath._writer.published.peer(it.peer).subnet if it.peer else None for it in (sent, lost, strangers)]
    assert peers == [ip_network("10.244.3.0/24"), None, ip_network("10.244.2.0/24")]
    assert (str(sent.outer), sent.outer_port) == datapath.socket_of(NARROW).getsockname()
    assert lost.outer is None
    assert str(strangers.outer) == STRANGER


@pytest.mark.parametrize("datapath", ["udp", "vxlan"], indirect=True)
def test_super_packet_of_a_pod_is_shown_once_with_its_segments(datapath: FastDatapath) -> None:
    watch = tracer(datapath)
    data = bytes(10 * 1400)
    for pod, counter, dropped in ((NEAR_POD, "encap_sent", 0), (DEAF_POD, "encap_drop_send", 10)):
        packet = tcp(POD, pod, data, check=PARTIAL)
        header = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_TCPV4, hdr_len=40, gso_size=1400, start=20, offset=16)
        batch = datapath.encap_batch([header + packet])
        assert batch.counts[counter] == 10
        (it,) = watch.take()
        assert (it.counter, it.n_segments, it.n_dropped, it.length) == (counter, 10, dropped, 40 + len(data))
        assert it.packet == packet[:40], "its headers alone"


@pytest.mark.parametrize("datapath", ["udp", "vxlan"], indirect=True)
@pytest.mark.parametrize("is_drops_alone", [False, True])
def test_what_the_device_refuses_in_the_end_is_shown_as_dropped(datapath: FastDatapath, is_drops_alone: bool) -> None:
    watch = tracer(datapath, replace(ALL, is_drops_alone=is_drops_alone))
    datapath.break_tun()
    flow = [tcp(NEAR_POD, POD, bytes(100), sequence=100 * n) for n in range(5)]
    sent = [*flow, udp(NEAR_POD, POD)]
    batch = datapath.decap_batch([(it, NEAR) for it in sent])
    assert batch.counts["decap_drop_tun"] == len(sent)
    found = watch.take()
    assert [it.counter for it in found] == ["decap_drop_tun"] * len(sent)
    assert [it.n_dropped for it in found] == [1] * len(sent)
    # As they came, with the TTL that they had.
    assert sorted(it.packet for it in found) == sorted([*(it[:40] for it in flow), sent[-1][:28]])


@pytest.mark.parametrize("datapath", ["udp", "vxlan"], indirect=True)
def test_each_packet_that_the_kernel_refuses_is_shown_once_where_only_drops_are(datapath: FastDatapath) -> None:
    """One entry could get the ends of others, which were not shown: it knew no place of its own."""
    watch = tracer(datapath, replace(ALL, is_drops_alone=True, snap_len=SNAP_LEN_MAX))
    refused = [udp(POD, DEAF_POD, bytes([n]) * 100) for n in range(20)]
    taken = [udp(POD, NEAR_POD, bytes(100))] * 20
    batch = [NO_VNET_HDR + it for pair in zip(refused, taken, strict=True) for it in pair]
    assert datapath.encap_batch(batch).counts["encap_drop_send"] == len(refused)
    found = watch.take()
    assert [(it.packet, it.n_dropped) for it in found] == [(packet, 1) for packet in refused]
    header = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_TCPV4, hdr_len=40, gso_size=1000, start=20, offset=16)
    datapath.encap_batch([header + tcp(POD, DEAF_POD, bytes(7000), check=PARTIAL)])
    found = watch.take()
    assert [(it.length, it.n_segments, it.n_dropped) for it in found] == [(1040, 1, 1)] * 7


@pytest.mark.parametrize("is_drops_alone", [False, True])
def test_what_the_control_plane_has_no_room_for_is_shown_as_dropped(fast: FastDatapath, is_drops_alone: bool) -> None:
    """It was not shown where only drops are: when the room was looked at, it had no entry."""
    fast.configure(punt_id=ID)
    watch = tracer(fast, replace(ALL, is_drops_alone=is_drops_alone, snap_len=SNAP_LEN_MAX))
    replies = [
        ipv4(NEAR_POD, OWN, icmp_message(0, rest=ID.to_bytes(2) + n.to_bytes(2)), protocol=1) for n in range(PUNTS + 5)
    ]
    for packet in replies:
        fast.send_from(NEAR, packet)
    while fast.turn():
        pass
    assert fast.counters["decap_drop_punt_full"] == 5
    expected = [(packet, "decap_punted", 0) for packet in replies[:PUNTS] if not is_drops_alone]
    expected += [(packet, "decap_drop_punt_full", 1) for packet in replies[PUNTS:]]
    assert [(it.packet, it.counter, it.n_dropped) for it in watch.take()] == expected


@pytest.mark.parametrize("is_drops_alone", [False, True])
def test_a_stray_that_the_control_plane_gets_is_no_drop(fast: FastDatapath, is_drops_alone: bool) -> None:
    """It was shown where only drops are."""
    fast.configure(punt_id=ID, learn_id=ID << 16 | SEQUENCE)
    watch = tracer(fast, replace(ALL, is_drops_alone=is_drops_alone, snap_len=SNAP_LEN_MAX))
    punted, dropped = answer(), udp(NEAR_POD, POD)
    batch = fast.decap_batch([(packet, STRANGER) for packet in (punted, dropped, punted, punted, dropped)])
    assert (batch.counts["decap_punted"], batch.counts["decap_drop_unknown_peer"]) == (3, 2)
    shown = [(it.packet, it.counter, it.n_dropped) for it in watch.take()]
    of_punted, of_dropped = (punted, "decap_punted", 0), (dropped, "decap_drop_unknown_peer", 1)
    if is_drops_alone:
        assert shown == [of_dropped] * 2
    else:
        assert shown == [of_punted, of_dropped, of_punted, of_punted, of_dropped]


@requires_netns
@pytest.mark.parametrize("is_drops_alone", [False, True])
def test_what_waits_for_the_send_buffer_of_a_worker_that_stops_is_shown_as_dropped(is_drops_alone: bool) -> None:
    """It was not shown where only drops are."""
    # Each longer than the one before, so that each is a message of its own.
    sent = [udp(POD, NEAR_POD, bytes(100 + n)) for n in range(30)]
    data = bytes(7000)
    header = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_TCPV4, hdr_len=40, gso_size=1000, start=20, offset=16)
    super_packet = tcp(POD, NEAR_POD, data, check=PARTIAL)

    def stop_in_the_middle() -> tuple[dict[str, int], list[Traced]]:
        with FastDatapath() as datapath:
            datapath.turn()
            watch = tracer(datapath, replace(ALL, is_drops_alone=is_drops_alone, snap_len=SNAP_LEN_MAX))
            shaper = ["rate", "1kbit", "burst", "2000", "limit", "1mb"]
            subprocess.run(["tc", "qdisc", "add", "dev", "lo", "root", "tbf", *shaper], check=True)
            datapath.udp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            datapath.stop()
            for raw in (*(NO_VNET_HDR + it for it in sent), header + super_packet):
                datapath.tun.send(raw)
            datapath.turn()
            subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True)
            datapath.collect(0)
            return datapath.counters, watch.take()

    with namespace() as ns:
        counters, found = ns.call(stop_in_the_middle)
    n_sent, n_dropped = counters["encap_sent"], counters["encap_drop_send"]
    assert n_sent + n_dropped == len(sent) + 7
    assert 0 < n_sent < len(sent)
    dropped = [it for it in found if it.counter == "encap_drop_send"]
    assert [it.packet for it in dropped][: len(sent) - n_sent] == sent[n_sent:]
    assert [it.n_dropped for it in dropped[: len(sent) - n_sent]] == [1] * (len(sent) - n_sent)
    last = [(it.length, it.n_segments, it.n_dropped) for it in dropped[len(sent) - n_sent :]]
    if is_drops_alone:
        assert last == [(1040, 1, 1)] * 7
        assert dropped == found
    else:
        assert last == [(40 + len(data), 7, 7)]
        assert [it.packet for it in found if it.counter == "encap_sent"] == sent[:n_sent]


@pytest.mark.parametrize("datapath", ["udp", "vxlan"], indirect=True)
def test_train_is_shown_packet_by_packet(datapath: FastDatapath) -> None:
    watch = tracer(datapath)
    train = b"".join(udp(NEAR_POD, POD, bytes([n]) * 200) for n in range(20))
    datapath.decap_messages([Message(train, NEAR, 228)])
    found = watch.take()
    assert [(it.counter, it.length, it.n_segments) for it in found] == [("decap_delivered", 228, 1)] * 20


# ------------------------------------------------------------------------------------------------- which packets

FILTERS = [
    words(POD, NEAR_POD),
    words(NEAR_POD, POD, is_one_way=True),
    words("any", "10.244.2.0/23"),
    words("10.244.0.0/16", "any", "udp"),
    words("0.0.0.0/0", "any"),
    words("::/0", "any"),
    words(POD6, "fd00:244:0:2::/64"),
    words("any", "any", "tcp"),
    words("any", "any", "icmp"),
    words("any", "any", "58"),
    words("any", "any", "udp", "53"),
    words("any", "any", "udp", "53", is_one_way=True),
    words("any", "any", "udp", "5353"),
    words("10.244.1.0/24", "any", "udp", str(PORT)),
    ALL,
]


def is_wanted(asked: LiveTraceRequest, packet: bytes) -> bool:
    """The same in Python, by the reference's reader of headers."""
    version = packet[0] >> 4 if packet else 0
    least = {4: IPV4_HDR_MIN, 6: IPV6_HDR_LEN}.get(version)
    if least is None or len(packet) < least or (version == 4 and not 5 <= packet[0] & 15 <= len(packet) // 4):
        return asked == replace(ALL, snap_len=asked.snap_len)
    ip = read_header(packet)
    protocols = {1: (1, 58 if version == 6 else 1)}.get(asked.protocol or 0, (asked.protocol,))
    if asked.version not in (None, version) or (asked.protocol is not None and ip.protocol not in protocols):
        return False
    ports = (None, None)
    transport = packet[ip.header_len :]
    if ip.protocol in (TCP, UDP) and not ip.is_later_fragment and len(transport) >= 4:
        ports = (int.from_bytes(transport[:2]), int.from_bytes(transport[2:4]))  # type: ignore[assignment]

    def is_between(source: object, destination: object, port: int | None) -> bool:
        return (
            (asked.source is None or source in asked.source)
            and (asked.destination is None or destination in asked.destination)
            and asked.port in (None, port)
        )

    return is_between(ip.source, ip.destination, ports[1]) or (
        not asked.is_one_way and is_between(ip.destination, ip.source, ports[0])
    )


@pytest.mark.parametrize("datapath", ["udp-ipv6"], indirect=True)
@settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(sent=st.lists(ANY_PACKET | mixed("encap"), min_size=10, max_size=20), asked=st.sampled_from(FILTERS))
def test_filter_chooses_as_the_reference_does(
    datapath: FastDatapath, sent: list[bytes], asked: LiveTraceRequest
) -> None:
    watch = tracer(datapath, replace(asked, snap_len=SNAP_LEN_MAX))
    sent = [it for it in sent if 0 < len(it) <= MTU]
    datapath.encap_batch([NO_VNET_HDR + it for it in sent])
    wanted = [it for it in sent if is_wanted(asked, reach_of(it))]
    assert [it.packet for it in watch.take()] == [reach_of(it)[:SNAP_LEN_MAX] for it in wanted]
    watch.stop()


def reach_of(packet: bytes) -> bytes:
    """Without what is behind it, where its own length fits."""
    version = packet[0] >> 4
    if version == 4 and len(packet) >= IPV4_HDR_MIN:
        header, total = (packet[0] & 15) * 4, int.from_bytes(packet[2:4])
        return packet[:total] if IPV4_HDR_MIN <= header <= total <= len(packet) else packet
    if version == 6 and len(packet) >= IPV6_HDR_LEN:
        total = IPV6_HDR_LEN + int.from_bytes(packet[4:6])
        is_jumbogram = total == IPV6_HDR_LEN and packet[6] == 0
        return packet[:total] if total <= len(packet) and not is_jumbogram else packet
    return packet


@pytest.mark.parametrize("datapath", ["udp-ipv6"], indirect=True)
def test_headers_alone_are_shown_unless_more_is_asked_for(datapath: FastDatapath) -> None:
    """What pods say to each other is nobody's business who looks for a lost packet."""
    secret = b"secret" * 20
    sent = {
        ipv4(POD, NEAR_POD, udp_segment(POD, NEAR_POD, secret)): 28,
        tcp(POD, NEAR_POD, secret): 40,
        tcp(POD, NEAR_POD, secret, options=bytes(12)): 52,
        ipv4(POD, NEAR_POD, icmp_message(8, data=secret), protocol=1): 28,
        ipv4(POD, NEAR_POD, secret, protocol=50): 20,
        ipv4(POD, NEAR_POD, secret, options=b"\1" * 8, protocol=50): 28,
        ipv4(POD, NEAR_POD, secret, protocol=17, offset=64): 20,
        ipv6(POD6, NEAR_POD6, udp_segment(POD6, NEAR_POD6, secret), protocol=17): 48,
        ipv6(POD6, NEAR_POD6, icmpv6_message(POD6, NEAR_POD6, 128, data=secret), protocol=58): 48,
        b"\x25" + secret: 20,
    }
    watch = tracer(datapath)
    datapath.encap_batch([NO_VNET_HDR + it for it in sent])
    assert [it.packet for it in watch.take()] == [packet[:n] for packet, n in sent.items()]
    watch = tracer(datapath, replace(ALL, snap_len=60))
    datapath.encap_batch([NO_VNET_HDR + it for it in sent])
    assert [it.packet for it in watch.take()] == [packet[:60] for packet in sent]


# ------------------------------------------------------------------------------------------------- on and off


@pytest.fixture
def fast() -> Iterator[FastDatapath]:
    skip_unless_built()
    with FastDatapath() as datapath:
        datapath.turn()
        yield datapath


def written(datapath: FastDatapath) -> int:
    """What the worker has ever shown and lost."""
    return sum(ring.load("written") + ring.load("lost") for ring in Tracer(datapath.stats)._rings())


def test_nothing_is_shown_while_nobody_watches(fast: FastDatapath) -> None:
    before = written(fast)
    fast.encap(NO_VNET_HDR + udp(POD, NEAR_POD))
    watch = tracer(fast)
    fast.encap(NO_VNET_HDR + udp(POD, NEAR_POD))
    watch.stop()
    fast.encap(NO_VNET_HDR + udp(POD, NEAR_POD))
    fast.decap(udp(NEAR_POD, POD), NEAR)
    assert written(fast) == before + 1
    assert watch.take() == []


def test_trace_ends_when_nobody_extends_it(fast: FastDatapath) -> None:
    """A control plane that is killed leaves it on."""
    watch = tracer(fast, valid_s=0.0)
    fast.encap(NO_VNET_HDR + udp(POD, NEAR_POD))
    assert watch.take() == []
    watch.extend(VALID_S)
    fast.encap(NO_VNET_HDR + udp(POD, NEAR_POD))
    assert len(watch.take()) == 1


def test_control_plane_that_begins_ends_what_another_has_left_on(fast: FastDatapath) -> None:
    tracer(fast)
    Tracer(fast.stats)
    before = written(fast)
    fast.encap(NO_VNET_HDR + udp(POD, NEAR_POD))
    assert written(fast) == before


def test_packets_that_find_no_room_are_counted(fast: FastDatapath) -> None:
    watch = tracer(fast)
    n = SLOTS + 100
    packet = NO_VNET_HDR + udp(POD, NEAR_POD)
    fast.encap_batch([packet] * n)
    assert watch.n_lost == 100
    found = []
    while more := watch.take():
        found += more
    assert len(found) == SLOTS
    fast.encap_batch([packet] * 3)
    assert len(watch.take()) == 3
    assert watch.n_lost == 100
    watch.start(ALL, VALID_S)
    assert watch.n_lost == 0, "those of an earlier trace"


def test_heir_of_a_worker_goes_on_showing(fast: FastDatapath) -> None:
    watch = tracer(fast)
    for number in range(3):
        fast.renew_worker()
        fast.encap(NO_VNET_HDR + udp(POD, NEAR_POD, bytes([number])))
    assert len(watch.take()) == 3


def test_entries_of_an_earlier_trace_are_not_shown(fast: FastDatapath) -> None:
    watch = tracer(fast)
    fast.encap(NO_VNET_HDR + udp(POD, NEAR_POD))
    watch.start(words("any", "any", "tcp"), VALID_S)
    assert watch.take() == []


def test_memory_is_given_back_at_the_end(fast: FastDatapath) -> None:
    # What a turn touches besides.
    fast.encap_batch([NO_VNET_HDR + udp(POD, NEAR_POD)] * 500)
    watch = tracer(fast)
    blocks = os.fstat(fast.stats.fd).st_blocks
    fast.encap_batch([NO_VNET_HDR + udp(POD, NEAR_POD)] * 500)
    grown = os.fstat(fast.stats.fd).st_blocks - blocks
    assert grown >= 500 * LAYOUT["traced"] // 512
    watch.stop()
    assert os.fstat(fast.stats.fd).st_blocks <= blocks + 16


def test_ring_that_somebody_has_written_to_is_put_right(fast: FastDatapath) -> None:
    watch = tracer(fast)
    for field, value in (("taken", 7), ("written", 2**64 - 1), ("written", 10**6)):
        watch._rings()[0].store(field, value)
        watch.take()
        fast.encap(NO_VNET_HDR + udp(POD, NEAR_POD))
        assert [it.counter for it in watch.take()] == ["encap_sent"]
    slot = watch._rings()[0].slot(0)
    for value in (0, 255):
        slot[:] = bytes([value]) * len(slot)
        watch._rings()[0].store("taken", watch._rings()[0].load("written") - SLOTS)
        assert all(it.counter in COUNTERS for it in watch.take())

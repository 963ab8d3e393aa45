"""The shortcut, the worker and tests/reference.py side by side: one result for every packet, and the same counters.

Whatever the kernel takes comes out as the reference says, and counts as the worker counts it.  Whatever it leaves is
unchanged, and the worker's; tests/datapath/test_equivalence.py holds that one to the reference.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.datapath.cases import DECAP, ENCAP, GOOD_DECAP, GOOD_ENCAP, Bad
from tests.datapath.harness import FastDatapath, skip_unless_built
from tests.datapath.test_equivalence import ANY_PACKET, ECN, FULL_RUN, OUTER, QUICK, mutated
from tests.datapath.test_shortcut_packets import (
    PASS,
    REDIRECT,
    SENT,
    TAKEN,
    TEST_RUN_MAX,
    THERE,
    Ground,
    Kernel,
    frame,
    known_peers,
    loaded,
    of_the_shortcut,
)
from tests.datapath.test_shortcut_packets import settings as settings_of
from tests.namespace import HAS_TCX, Namespace, linked_namespace, requires_netns
from tests.packets import (
    GSO_TCPV4,
    MTU,
    NEAR_POD,
    NEEDS_CSUM,
    NO_VNET_HDR,
    OWN,
    PARTIAL,
    POD,
    PORT,
    TCP_PSH,
    UNDERLAY,
    ipv4,
    overlay,
    pattern,
    tcp_segment,
    udp_segment,
    vnet_hdr,
    with_header_checksum,
)
from tests.reference import NOT_ECT, decap, encap, outer_tos
from udptun.datapath.shortcut.counts import COUNTS
from udptun.datapath.shortcut.programs import LinkIndexes, Programs, find_lack

pytestmark = [requires_netns, pytest.mark.skipif(os.geteuid() == 0 and bool(find_lack()), reason=find_lack())]

N_SHARED = 8
"""Of COUNTS: counters of docs/wire-format.md; the others are why packets are left to the worker."""
HEADER_LEN, OUTER_LEN = 20, 28
ETHERNET_LEN = 14
TAKEN_HERE = {"source-an-address-of-ours-that-the-peer-leases", "a-pods-datagram-to-our-socket-on-a-leased-address"}
"""Bad where a peer leases an address of ours, which is not so in this table (see `of_the_shortcut`)."""


def counts_of(programs: Programs) -> Counter[str]:
    raw, step = programs.counts.read_first(len(COUNTS)), programs.counts.stored_len
    return Counter({name: sum(memoryview(raw)[i * step : (i + 1) * step].cast("Q")) for i, name in enumerate(COUNTS)})


def peer_counts_of(programs: Programs, index: int) -> list[int]:
    """PEER_COUNTERS of the peer."""
    rows = struct.iter_unpack("=4Q", programs.peer_counts.read(index))
    return [sum(column) for column in zip(*rows, strict=True)]


def reasons(moved: Counter[str]) -> set[str]:
    """Why packets were left to the worker; nothing else has moved."""
    assert not set(moved) & set(COUNTS[:N_SHARED]), moved
    return set(moved)


@contextmanager
def moving(programs: Programs) -> Iterator[Counter[str]]:
    """What is counted in the block is there behind it."""
    moved, before = Counter[str](), counts_of(programs)
    yield moved
    moved.update(+(counts_of(programs) - before))


@pytest.fixture(scope="module")
def worker() -> Iterator[FastDatapath]:
    skip_unless_built()
    with FastDatapath() as fast:
        yield fast


@contextmanager
def counted_by(worker: FastDatapath, pod: str) -> Iterator[tuple[Counter[str], list[int]]]:
    """What the worker counts in the block, of that which programs count too, and of the peer that leases `pod`."""
    moved, of_peer = Counter[str](), list[int]()
    before, peer_before = Counter(worker.stats.counters()), worker.peer_counts(pod)
    yield moved, of_peer
    more = Counter(worker.stats.counters()) - before
    moved.update({name: n for name, n in more.items() if name in COUNTS})
    of_peer.extend(now - was for now, was in zip(worker.peer_counts(pod), peer_before, strict=True))


# -------------------------------------------------------------------------------------------------- from the peers


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    table = of_the_shortcut(overlay())
    programs = loaded(settings_of(table), LinkIndexes(1, 1, 1, 1), known_peers(table))
    yield Kernel(table, programs)
    programs.close()


def is_taken(kernel: Kernel, given_frame: bytes, payload: bytes, source: str, ecn: int = NOT_ECT) -> bool:
    """Whether the kernel takes the datagram.  It does right in any case."""
    with moving(kernel.programs) as moved:
        answer, after = kernel.decap(given_frame)
        if answer == REDIRECT:
            assert kernel.decap(after, "deliver")[0] == REDIRECT
    if answer == PASS:
        assert after == given_frame
        assert sum(moved[it] for it in reasons(moved)) <= 1
        return False
    assert answer == REDIRECT
    for check in ("off", "peer", "strict"):
        table = replace(kernel.table, source_check=check)  # type: ignore[arg-type]
        outcome = decap(table, payload, IPv4Address(source), PORT, outer_ecn=ecn)
        assert outcome.counter == "decap_delivered"
        assert after[ETHERNET_LEN:] == outcome.writes[0][len(NO_VNET_HDR) :]
    assert moved == {"decap_packets": 1, "decap_delivered": 1, "tun_written_bytes": len(payload)}
    return True


@pytest.mark.parametrize("slug", sorted(TAKEN))
def test_what_the_kernel_takes_from_a_peer_counts_as_the_workers_packets(
    kernel: Kernel, worker: FastDatapath, slug: str
) -> None:
    packet, source = GOOD_DECAP[slug]
    pod = str(IPv4Address(packet[12:16]))
    peer = kernel.table.leasing(IPv4Address(pod))
    assert peer is not None
    before = peer_counts_of(kernel.programs, peer.index)
    with counted_by(worker, pod) as (by_worker, of_peer):
        worker.decap(packet, source)
    with moving(kernel.programs) as by_kernel:
        answer, after = kernel.decap(frame(packet, source))
        assert (answer, kernel.decap(after, "deliver")[0]) == (REDIRECT, REDIRECT)
    assert by_kernel == by_worker
    now = peer_counts_of(kernel.programs, peer.index)
    assert [after - was for after, was in zip(now, before, strict=True)] == of_peer == [0, 0, 1, len(packet)]


@pytest.mark.parametrize("case", [it for it in DECAP if len(it.packet) < TEST_RUN_MAX], ids=lambda it: it.slug)
def test_no_bad_packet_of_a_peer_counts_before_the_worker_has_it(kernel: Kernel, case: Bad) -> None:
    """One reason at most, and no counter of the workers'."""
    packet, source = case.packet, case.source
    assert not is_taken(kernel, frame(packet, source), packet, source) or case.slug in TAKEN_HERE


def values_of(byte: int, request: pytest.FixtureRequest) -> Iterator[int]:
    """What the byte is changed to: all, or each bit, which is quicker."""
    return iter(range(256)) if request.config.getoption("--full") else (byte ^ 1 << bit for bit in range(8))


def test_decap_agrees_on_every_byte_of_what_peers_send(kernel: Kernel, request: pytest.FixtureRequest) -> None:
    """Of the inner headers, and of all before them, with right checksums."""
    good, source = GOOD_DECAP["udp"]
    n = Counter[bool]()
    for at in range(HEADER_LEN + 8):
        for value in values_of(good[at], request):
            packet = with_header_checksum(good[:at] + bytes([value]) + good[at + 1 :])
            n[is_taken(kernel, frame(packet, source), packet, source)] += 1
    whole = frame(good, source)
    for at in range(ETHERNET_LEN + OUTER_LEN):
        for value in values_of(whole[at], request):
            changed = whole[:at] + bytes([value]) + whole[at + 1 :]
            outer = with_header_checksum(changed[ETHERNET_LEN:])
            said = str(IPv4Address(outer[12:16]))
            n[taken := is_taken(kernel, changed[:ETHERNET_LEN] + outer, good, said, outer[1] & 3)] += 1
            if taken:
                assert_is_for_our_socket(outer, good)
    assert min(n.values()) > sum(n.values()) / 4


def assert_is_for_our_socket(outer: bytes, inner: bytes) -> None:
    """Of an outer packet from its first byte on."""
    version, _, length, ident, fragment, _, protocol = struct.unpack_from(">BBHHHBB", outer)
    assert (version, length, protocol) == (0x45, OUTER_LEN + len(inner), socket.IPPROTO_UDP)
    assert (ident >> 12, fragment & 0x3FFF) == (7, 0)
    assert str(IPv4Address(outer[16:20])) == UNDERLAY
    _, port, udp_length, check = struct.unpack_from(">HHHH", outer, HEADER_LEN)
    assert (port, udp_length, check) == (PORT, 8 + len(inner), 0)


FROM_PEERS = st.sampled_from([GOOD_DECAP[slug] for slug in sorted(TAKEN)]).flatmap(
    lambda it: st.tuples(mutated(st.just(it[0])), st.just(it[1]))
)
FROM_ANYBODY = FROM_PEERS | FROM_PEERS | st.tuples(ANY_PACKET, OUTER)


def check_random_decap(kernel: Kernel, how: settings) -> None:
    n = Counter[bool]()

    @how
    @given(datagrams=st.lists(FROM_ANYBODY, min_size=5, max_size=40), ecn=ECN)
    def agree(datagrams: list[tuple[bytes, str]], ecn: int) -> None:
        for packet, source in datagrams:
            if len(packet) < TEST_RUN_MAX:
                n[is_taken(kernel, frame(packet, source, tos=ecn), packet, source, ecn)] += 1

    agree()
    assert n[True] > 30
    assert n[False] > 200


def test_decap_agrees_over_random_packets(kernel: Kernel) -> None:
    check_random_decap(kernel, settings(QUICK, max_examples=40))


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_decap_agrees_over_very_many_random_packets(kernel: Kernel) -> None:
    check_random_decap(kernel, FULL_RUN)


# ---------------------------------------------------------------------------------------------------- to the peers

_PACKET_VNET_HDR = 15
FLOW_GAP_S = 0.021
_TCP_FLAGS = HEADER_LEN + 13
_TCP_REPAIR, _TCP_REPAIR_WINDOW, _OFF_WITHOUT_A_WORD = 19, 29, -1


RAW = {
    f"{name}-with-{n_bytes}-bytes-and-{n_options}-of-options": vnet_hdr(
        flags=NEEDS_CSUM, start=20 + n_options, offset=offset
    )
    + ipv4(POD, NEAR_POD, segment(POD, NEAR_POD, pattern(n_bytes), check=PARTIAL), protocol=protocol,
           options=b"\1" * n_options)
    for name, protocol, segment, offset in (("tcp", 6, tcp_segment, 16), ("udp", 17, udp_segment, 6))
    for n_bytes in (0, 1, 2, 63, 1000, 1428)
    for n_options in (0, 4)
}  # fmt: skip
"""Packets whose checksum the sender has left to the device."""


class WideGround(Ground):
    """One that can be given more, and whose underlay cuts up and sums itself, as a real network would have it."""

    def __init__(self) -> None:
        super().__init__("tcx" if HAS_TCX else "clsact")
        for link in ("v0", "v1"):
            subprocess.run(["ip", "link", "set", link, "mtu", "65535"], check=True)
        for command in (f"address add {OWN}/32 dev flannel0", "route add 10.244.0.0/16 dev flannel0"):
            subprocess.run(["ip", *command.split()], check=True)
        off = [word for feature in ("tx", "tso", "gso") for word in (feature, "off")]
        subprocess.run(["ethtool", "-K", "v0", *off], check=True, capture_output=True)
        self._with_header = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._with_header.bind(("flannel0", socket.htons(0x0800)))
        self._with_header.setsockopt(263, _PACKET_VNET_HDR, 1)

    def send_raw(self, raw: bytes) -> tuple[str, bytes]:
        """As `send`; a virtio header comes first.  OSError: the kernel makes no packet of that."""
        self._with_header.sendto(raw, ("flannel0", 0x0800))
        return self._receive()

    def send_from_afar(self, whole: bytes) -> None:
        """A frame that comes in by the underlay."""
        self._far.send(whole)

    def send_stream(self, data: bytes) -> list[bytes]:
        """Send it by a connection of TCP to a pod, whose end is nowhere; the inner packets that came out."""
        tcp, found = socket.IPPROTO_TCP, list[bytes]()
        with socket.socket() as connection:
            connection.setsockopt(tcp, _TCP_REPAIR, 1)
            connection.bind((OWN, 0))
            connection.connect((NEAR_POD, 9))
            connection.setsockopt(tcp, _TCP_REPAIR_WINDOW, struct.pack("=5I", 0, 65535, 65535, 65535, 0))
            connection.setsockopt(tcp, _TCP_REPAIR, _OFF_WITHOUT_A_WORD)
            connection.setsockopt(tcp, socket.TCP_NODELAY, 1)
            self._drain()
            connection.send(data)
            while sum(len(packet) - 2 * HEADER_LEN for packet in found) < len(data):
                where, out = self._receive()
                assert where == "wire"
                found.append(out[ETHERNET_LEN + OUTER_LEN :])
            # It ends without a word as well.
            connection.setsockopt(tcp, _TCP_REPAIR, 1)
        return found

    def _drain(self) -> None:
        """Let go of what else has come out on the far end."""
        with suppress(BlockingIOError):
            while self._far.recv(65600, socket.MSG_DONTWAIT):
                pass

    def close(self) -> None:
        self._with_header.close()
        super().close()


@pytest.fixture(scope="module")
def ground() -> Iterator[tuple[Namespace, WideGround]]:
    with linked_namespace() as ns:
        it = ns.call(WideGround)
        yield ns, it
        it.close()


def is_sent(ground: WideGround, packet: bytes, raw: bytes = b"") -> bool:
    """Whether the kernel sends what is put into the device, `packet` or `raw`.  It does right in any case."""
    with moving(ground.programs) as moved:
        where, out = ground.send_raw(raw) if raw else ground.send(packet)
    if where == "worker":
        assert raw or out == packet
        assert sum(moved[it] for it in reasons(moved)) <= 1
        return False
    (outcome,) = encap(ground.table, raw or NO_VNET_HDR + packet)
    assert outcome.counter == "encap_sent"
    ((_, payload),) = outcome.sends
    peer = ground.table.leasing(IPv4Address(packet[16:20]))
    assert peer is not None
    datagram = struct.pack(">HHHH", PORT, PORT, 8 + len(payload), 0) + payload
    how = {"tos": outer_tos(peer, packet), "ident": 0x7000, "flags": "DF"}
    assert out[ETHERNET_LEN:] == ipv4(UNDERLAY, str(THERE), datagram, **how)  # type: ignore[arg-type]
    assert moved == {"encap_packets": 1, "encap_sent": 1, "udp_sent_bytes": len(packet)}
    return True


def test_what_the_kernel_sends_to_a_peer_counts_as_the_workers_packets(
    ground: tuple[Namespace, WideGround], worker: FastDatapath
) -> None:
    ns, it = ground
    for slug in sorted(SENT):
        packet = GOOD_ENCAP[slug]
        pod = str(IPv4Address(packet[16:20]))
        peer = it.table.leasing(IPv4Address(pod))
        assert peer is not None
        before = peer_counts_of(it.programs, peer.index)
        with counted_by(worker, pod) as (by_worker, of_peer):
            worker.encap_batch([NO_VNET_HDR + packet])
        with moving(it.programs) as by_kernel:
            assert ns.call(lambda packet=packet: it.send(packet))[0] == "wire"  # type: ignore[misc]
        assert by_kernel == by_worker
        now = peer_counts_of(it.programs, peer.index)
        assert [after - was for after, was in zip(now, before, strict=True)] == of_peer == [1, len(packet), 0, 0]


def test_no_bad_packet_to_a_peer_counts_before_the_worker_has_it(ground: tuple[Namespace, WideGround]) -> None:
    """One reason at most, and no counter of the workers'."""
    ns, it = ground
    bad = [case for case in ENCAP if len(case.packet) >= HEADER_LEN]
    assert {case.slug for case in bad if ns.call(lambda case=case: is_sent(it, case.packet))} <= TAKEN_HERE  # type: ignore[misc]


def test_encap_agrees_on_every_byte_of_the_header(
    ground: tuple[Namespace, WideGround], request: pytest.FixtureRequest
) -> None:
    ns, it = ground
    good = GOOD_ENCAP["udp"]

    def check() -> Counter[bool]:
        n = Counter[bool]()
        for at in range(HEADER_LEN + 8):
            for value in values_of(good[at], request):
                n[is_sent(it, with_header_checksum(good[:at] + bytes([value]) + good[at + 1 :]))] += 1
        return n

    n = ns.call(check)
    assert min(n.values()) > sum(n.values()) / 8


def check_random_encap(ground: tuple[Namespace, WideGround], how: settings) -> None:
    ns, it = ground
    n = Counter[bool]()
    to_peers = st.sampled_from([GOOD_ENCAP[slug] for slug in sorted(SENT)]).flatmap(lambda it: mutated(st.just(it)))

    @how
    @given(packets=st.lists(ANY_PACKET | to_peers, min_size=5, max_size=40))
    def agree(packets: list[bytes]) -> None:
        for packet in packets:
            if HEADER_LEN <= len(packet) <= MTU:
                n[is_sent(it, packet)] += 1

    ns.call(agree)
    # How many are left in order behind others depends on the time.
    assert min(n[True], n[False]) > 10


def test_encap_agrees_over_random_packets(ground: tuple[Namespace, WideGround]) -> None:
    check_random_encap(ground, settings(QUICK, max_examples=40))


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_encap_agrees_over_very_many_random_packets(ground: tuple[Namespace, WideGround]) -> None:
    check_random_encap(ground, settings(FULL_RUN, max_examples=2000))


@pytest.mark.parametrize("name", RAW)
def test_a_checksum_that_was_left_to_the_device_is_complete_on_the_wire(
    ground: tuple[Namespace, WideGround], name: str
) -> None:
    ns, it = ground
    time.sleep(FLOW_GAP_S)
    assert ns.call(lambda: is_sent(it, RAW[name][len(NO_VNET_HDR) :], RAW[name])) == name.endswith("-0-of-options")


@pytest.mark.parametrize("case", [it for it in DECAP if len(it.packet) >= TEST_RUN_MAX], ids=lambda it: it.slug)
def test_bad_packets_longer_than_a_test_run_takes_are_left_to_the_worker(
    ground: tuple[Namespace, WideGround], case: Bad
) -> None:
    ns, it = ground
    address = ns.show("link show v0")[0]["address"]
    whole = bytes.fromhex(address.replace(":", "")) + frame(case.packet, str(THERE))[6:]

    def is_left() -> bool:
        """Whether it is counted as such; frames as long as this come in at once."""
        with moving(it.programs) as moved:
            it.send_from_afar(whole)
        return sum(moved[name] for name in reasons(moved)) == 1

    assert ns.call(is_left)


@pytest.mark.parametrize("n_bytes", [1, 400, 1000, 4999])
def test_a_stream_of_this_host_is_cut_up_as_the_reference_does(
    ground: tuple[Namespace, WideGround], n_bytes: int
) -> None:
    """By the kernel, below the outer headers: what comes out are the segments of a super-packet."""
    ns, it = ground
    time.sleep(FLOW_GAP_S)
    data = pattern(n_bytes, 1)

    def sent() -> list[bytes]:
        with moving(it.programs) as moved:
            packets = it.send_stream(data)
        assert moved == {
            "encap_packets": len(packets),
            "encap_sent": len(packets),
            "udp_sent_bytes": sum(map(len, packets)),
        }
        return packets

    packets = ns.call(sent)
    assert b"".join(packet[2 * HEADER_LEN :] for packet in packets) == data
    # The kernel may make several of them, and the last segment of each says so.
    while packets:
        n = next(i for i, packet in enumerate(packets, 1) if packet[_TCP_FLAGS] & TCP_PSH)
        super_packet, packets = packets[:n], packets[n:]
        assert [outcome.sends[0][1] for outcome in encap(it.table, whole_again(super_packet))] == super_packet


def whole_again(packets: list[bytes]) -> bytes:
    """The super-packet that these are the segments of, a TTL before, behind its virtio header."""
    first, payload = packets[0], b"".join(packet[2 * HEADER_LEN :] for packet in packets)
    header = bytearray(first[: 2 * HEADER_LEN])
    header[2:4] = (2 * HEADER_LEN + len(payload)).to_bytes(2)
    header[8] += 1
    header[_TCP_FLAGS] = packets[-1][_TCP_FLAGS]
    size = len(first) - 2 * HEADER_LEN
    gso = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_TCPV4, gso_size=size, start=HEADER_LEN, offset=16)
    return gso + with_header_checksum(bytes(header) + payload)

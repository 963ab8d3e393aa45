"""What the fast path does where the MTU of the underlay's device is smaller than ours: rows 7 and 9 of the encap table.

    127.0.0.1 (worker) --lo, MTU 1000--> 127.0.0.2 (peer)

In a network namespace without a name that lives only as long as the test's sockets.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from tests import reference
from tests.datapath.harness import FastDatapath, inner_packet, skip_unless_built
from tests.packets import (
    GSO_TCPV4,
    GSO_TCPV6,
    MTU,
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
    icmp_answer,
    ipv4,
    ipv6,
    pattern,
    stepped,
    tcp_segment,
    vnet_hdr,
    with_header_checksum,
)
from tests.reference import Outcome

PATH_MTU = 1000

pytestmark = pytest.mark.netns


@pytest.fixture
def narrow_path(fast_in_namespace: FastDatapath) -> FastDatapath:
    run_ip("link", "set", "lo", "mtu", str(PATH_MTU))
    return fast_in_namespace


@pytest.fixture
def fast_in_namespace(is_vxlan: bool) -> Iterator[FastDatapath]:
    """The fast path with all its sockets in a namespace of their own."""
    with in_namespace(is_vxlan=is_vxlan) as datapath:
        yield datapath


@contextmanager
def in_namespace(**how: bool) -> Iterator[FastDatapath]:
    skip_unless_built()
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as home:
        clone_newnet = 0x40000000
        if libc.unshare(clone_newnet) != 0:
            raise OSError(ctypes.get_errno(), "cannot make a network namespace")
        try:
            run_ip("link", "set", "lo", "up")
            with FastDatapath(**how) as datapath:
                yield datapath
        finally:
            if libc.setns(home.fileno(), clone_newnet) != 0:
                pytest.exit(f"cannot go back to the network namespace: {os.strerror(ctypes.get_errno())}")


def run_ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True)


def fits(datapath: FastDatapath) -> int:
    """The largest packet that the path takes, bytes."""
    return PATH_MTU - 28 - datapath.table.prefix_len


def oversize(n_bytes: int, flags: str = "") -> bytes:
    return ipv4(POD, NEAR_POD, bytes(n_bytes - 20), flags=flags)


def test_a_packet_that_just_fits_the_path_is_sent(narrow_path: FastDatapath) -> None:
    packet = oversize(fits(narrow_path), "DF")
    assert narrow_path.encap(NO_VNET_HDR + packet) == outcome(narrow_path, packet)


@pytest.mark.parametrize("excess", [1, 400])
def test_the_sender_is_told_the_path_mtu_when_df_forbids_fragments(narrow_path: FastDatapath, excess: int) -> None:
    packet = oversize(fits(narrow_path) + excess, "DF")
    answer = NO_VNET_HDR + icmp_answer(3, 4, packet, source=OWN, next_hop_mtu=fits(narrow_path))
    expected = Outcome("encap_drop_too_big", writes=(answer,), icmp="icmp_sent")
    assert narrow_path.encap(NO_VNET_HDR + packet) == expected == outcome(narrow_path, packet)


@pytest.mark.parametrize(("checksum", "quoted"), [(0x0000, 0x0000), (0x0001, 0x0001), (0xFFFF, 0x0000)])
def test_the_answer_quotes_the_packet_as_it_came_but_for_one_form_of_zero(
    narrow_path: FastDatapath, checksum: int, quoted: int
) -> None:
    packet = with_header_checksum(oversize(1472, "DF"), checksum)
    as_quoted = with_header_checksum(packet, quoted)
    answer = NO_VNET_HDR + icmp_answer(3, 4, as_quoted, source=OWN, next_hop_mtu=fits(narrow_path))
    expected = Outcome("encap_drop_too_big", writes=(answer,), icmp="icmp_sent")
    assert narrow_path.encap(NO_VNET_HDR + packet) == expected == outcome(narrow_path, packet)


def test_the_outer_packet_is_fragmented_when_the_inner_one_may_be(narrow_path: FastDatapath) -> None:
    packet = oversize(1472)
    assert narrow_path.encap(NO_VNET_HDR + packet) == outcome(narrow_path, packet)


def test_fragmenting_one_packet_does_not_change_what_becomes_of_the_next(narrow_path: FastDatapath) -> None:
    small, may, may_not = oversize(100, "DF"), oversize(1472), oversize(1472, "DF")
    packets = [small, may, may_not, small, may, may_not, small]
    batch = narrow_path.encap_batch([NO_VNET_HDR + packet for packet in packets])
    assert batch.counts == {"encap_packets": 7, "encap_sent": 5, "encap_drop_too_big": 2, "icmp_sent": 2}
    (remote, _payload) = outcome(narrow_path, small).sends[0]
    assert batch.sends == {remote: [stepped(packet) for packet in packets if packet is not may_not]}


@pytest.mark.parametrize("flags", ["DF", ""])
@pytest.mark.parametrize("excess", [0, 1, 400])
def test_each_segment_of_a_super_packet_meets_the_path_mtu_by_itself(
    narrow_path: FastDatapath, excess: int, flags: str
) -> None:
    """Segments that fit are sent, for instance the last one; each of the others is answered, or fragmented."""
    size = fits(narrow_path) - 40 + excess
    segment = tcp_segment(POD, NEAR_POD, pattern(3 * size + 17), check=PARTIAL)
    packet = ipv4(POD, NEAR_POD, segment, protocol=6, flags=flags)
    raw = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_TCPV4, gso_size=size) + packet
    small = oversize(100, "DF")
    batch = narrow_path.encap_batch([NO_VNET_HDR + small, raw, NO_VNET_HDR + small])
    around = outcome(narrow_path, small)
    of_segments = reference.encap(narrow_path.table, raw, path_mtu=PATH_MTU)
    outcomes = [around, *(bare(narrow_path, one) for one in of_segments), around]
    sends = [payload for one in outcomes for _remote, payload in one.sends]
    assert batch.sends == {around.sends[0][0]: sends}
    assert batch.writes == [write for one in outcomes for write in one.writes]
    n_refused = 3 if flags and excess else 0
    drops = {"encap_drop_too_big": n_refused, "icmp_sent": n_refused} if n_refused else {}
    assert batch.counts == {"encap_packets": 6, "encap_sent": 6 - n_refused} | drops


def test_a_narrow_path_does_not_end_the_sending_of_groups(narrow_path: FastDatapath) -> None:
    """Some kernels say EINVAL in this case, as kernels without UDP_SEGMENT do."""
    segment = tcp_segment(POD, NEAR_POD, pattern(3 * 1400), check=PARTIAL)
    packet = ipv4(POD, NEAR_POD, segment, protocol=6, flags="DF")
    raw = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_TCPV4, gso_size=1400) + packet
    assert narrow_path.encap_batch([raw]).counts["encap_drop_too_big"] == 3
    assert not narrow_path.refused


def test_ipv6_is_fragmented_outside_up_to_what_every_path_must_take_and_answered_above() -> None:
    """RFC 2473 7.1: no host need send less than 1280 bytes, so nobody may be told to."""
    with in_namespace(has_ipv6=True) as datapath:
        for path_mtu, lengths in ((1000, (972, 973, 1280, 1281, MTU)), (1400, (1372, 1373, MTU))):
            run_ip("link", "set", "lo", "mtu", str(path_mtu))
            least = max(path_mtu - 28, 1280)
            for n_bytes in lengths:
                packet = ipv6(POD6, NEAR_POD6, bytes(n_bytes - 40))
                expected = Outcome("encap_sent", sends=((datapath.table.peers[0].remote, stepped(packet)),))
                if n_bytes > least:
                    answer = NO_VNET_HDR + icmp_answer(2, 0, packet, source=OWN6, next_hop_mtu=least)
                    expected = Outcome("encap_drop_too_big", writes=(answer,), icmp="icmp_sent")
                assert datapath.encap(NO_VNET_HDR + packet) == expected == outcome(datapath, packet, path_mtu)


def test_each_segment_of_ipv6_meets_the_path_mtu_by_itself() -> None:
    segment = tcp_segment(POD6, NEAR_POD6, pattern(3 * 1400 + 17), check=PARTIAL)
    packet = ipv6(POD6, NEAR_POD6, segment, protocol=6)
    raw = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_TCPV6, gso_size=1400, start=40, offset=16) + packet
    with in_namespace(has_ipv6=True) as datapath:
        run_ip("link", "set", "lo", "mtu", str(PATH_MTU))
        batch = datapath.encap_batch([raw])
        outcomes = reference.encap(datapath.table, raw, path_mtu=PATH_MTU)
        assert batch.counts == {"encap_packets": 4, "encap_sent": 1, "encap_drop_too_big": 3, "icmp_sent": 3}
        assert batch.writes == [write for one in outcomes for write in one.writes]
        assert [*batch.sends.values()] == [[payload for one in outcomes for _remote, payload in one.sends]]


@pytest.mark.parametrize("is_ipv6", [False, True], ids=["IPv4", "IPv6"])
def test_what_is_longer_than_a_measured_path_leaves_so_that_it_may_be_fragmented(is_ipv6: bool) -> None:
    """Before, it left with DF, and routers dropped it: of IPv6 all of 1280 bytes and less that was too long."""
    segment = tcp_segment(POD6, NEAR_POD6, pattern(3 * 1100 + 17), check=PARTIAL)
    train = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_TCPV6, gso_size=1100, start=40, offset=16)
    train += ipv6(POD6, NEAR_POD6, segment, protocol=6)
    with in_namespace(has_ipv6=True) as datapath, frames_on_lo() as frames:
        narrow = tuple(replace(peer, mtu=PATH_MTU) for peer in datapath.table.peers)
        datapath.configure(peers=narrow)
        lengths = (100, PATH_MTU, PATH_MTU + 1, 100, 1280, 1280)
        packets = [NO_VNET_HDR + (ipv6(POD6, NEAR_POD6, bytes(n - 40)) if is_ipv6 else oversize(n)) for n in lengths]
        raws = [*packets, train, packets[0]] if is_ipv6 else packets
        batch = datapath.encap_batch(raws)
        outcomes = [one for raw in raws for one in reference.encap(datapath.table, raw)]
        assert batch.counts == {"encap_packets": len(outcomes), "encap_sent": len(outcomes)}
        # All of them, in the order of the reads.
        assert [*batch.sends.values()] == [[payload for one in outcomes for _remote, payload in one.sends]]
        assert batch.writes == []
        # The last segment is short; the super-packet is sent as a whole nevertheless.
        is_long = [n > PATH_MTU for n in lengths] + [True] * 4 * is_ipv6 + [False] * is_ipv6
        assert [not has_df for has_df in frames()] == is_long


def test_longer_packets_of_ipv6_are_answered_where_the_measured_path_is_narrow() -> None:
    """Nobody may be told to send less than 1280 bytes."""
    with in_namespace(has_ipv6=True) as datapath:
        datapath.configure(peers=tuple(replace(peer, mtu=PATH_MTU) for peer in datapath.table.peers))
        packet = ipv6(POD6, NEAR_POD6, bytes(1281 - 40))
        answer = NO_VNET_HDR + icmp_answer(2, 0, packet, source=OWN6, next_hop_mtu=1280)
        expected = Outcome("encap_drop_too_big", writes=(answer,), icmp="icmp_sent")
        assert datapath.encap(NO_VNET_HDR + packet) == expected
        assert [expected] == reference.encap(datapath.table, NO_VNET_HDR + packet)


@contextmanager
def frames_on_lo() -> Iterator[Callable[[], list[bool]]]:
    """Whether each IPv4 packet that has crossed lo since then has DF."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)) as capture:
        capture.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)

        def frames() -> list[bool]:
            found = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet, where = capture.recvfrom(1 << 16, socket.MSG_DONTWAIT)
                    if where[2] == socket.PACKET_HOST:
                        found.append(bool(packet[6] & 0x40))
            return found

        yield frames


def outcome(datapath: FastDatapath, packet: bytes, path_mtu: int = PATH_MTU) -> Outcome:
    """The reference's, with the namespace's path MTU."""
    assert any(peer.remote[0] == IPv4Address(NEAR) for peer in datapath.table.peers)
    (one,) = reference.encap(datapath.table, NO_VNET_HDR + packet, path_mtu=path_mtu)
    return bare(datapath, one)


def bare(datapath: FastDatapath, one: Outcome) -> Outcome:
    """With the inner packets in place of the datagrams."""
    sends = tuple((remote, inner_packet(datapath.table, remote, payload)) for remote, payload in one.sends)
    return replace(one, sends=sends)

"""The programs of the shortcut beside tests/reference.py: the same result, or the packet is left to the worker.

Packets from peers are put into `decap` by the kernel (BPF_PROG_TEST_RUN).  Those to peers go into a real TUN device,
with `encap` on it, and come out on the far end of an underlay, or for the worker on the TUN's queue.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from itertools import product
from pathlib import Path
from random import Random

import pytest

from tests.datapath.cases import DECAP, ENCAP, GOOD_DECAP, GOOD_ENCAP, Bad
from tests.namespace import HAS_TCX, Namespace, linked_namespace, requires_netns
from tests.packets import (
    LOCAL_IN_A_LEASE,
    MTU,
    NEAR,
    NEAR_POD,
    NO_VNET_HDR,
    POD,
    PORT,
    UNDERLAY,
    ipv4,
    overlay,
    udp,
)
from tests.reference import CE, ECT_0, ECT_1, NOT_ECT, Table, decap, encap, outer_tos
from udptun.core.errors import KernelError
from udptun.datapath.peer_entries import PeerEntry
from udptun.datapath.settings import Remote
from udptun.datapath.shortcut.counts import COUNTS
from udptun.datapath.shortcut.entries import PEER, KernelPeers
from udptun.datapath.shortcut.programs import DETOUR, LinkIndexes, Programs, ShortcutSettings, find_lack
from udptun.kernel.bpf import Hook, attach, load_program
from udptun.kernel.filters import attach_filter
from udptun.kernel.tun import open_queues

pytestmark = [requires_netns, pytest.mark.skipif(os.geteuid() == 0 and bool(find_lack()), reason=find_lack())]

PASS, REDIRECT = 0xFFFFFFFF, 7
"""TC_ACT_UNSPEC, after which the next program of the device has its turn, and TC_ACT_REDIRECT."""
ETH_P_IP = 0x0800
_TEST_RUN = struct.Struct("=IIIIQQIIIIQQIII")
_PROG_TEST_RUN, _SYS_BPF = 10, {"x86_64": 321, "aarch64": 280}[os.uname().machine]
_libc = ctypes.CDLL(None, use_errno=True)


def of_the_shortcut(table: Table) -> Table:
    """The overlay of the other tests without our address in the first peer's subnet: the kernel may know the peer."""
    return replace(table, local_addresses=table.local_addresses - {IPv4Address(LOCAL_IN_A_LEASE)})


def known_peers(table: Table, *, takes_shortcut: bool = True) -> KernelPeers:
    peers = KernelPeers(table.own_subnet, table.mtu)
    peers.set_local(table.local_addresses)
    for it in table.peers:
        address, port = it.remote
        remote = Remote(address, port, True, carries_ecn=it.carries_ecn, takes_shortcut=takes_shortcut)
        peers.set_peer(it.subnet, PeerEntry(remote, it.index, it.mtu, it.is_dead))
    return peers


@dataclass(frozen=True, slots=True)
class Kernel:
    """The programs with what they know of `table`, attached to nothing."""

    table: Table
    programs: Programs

    def decap(self, frame: bytes, program: str = "decap") -> tuple[int, bytes]:
        """What the program answers, and the frame as it is then."""
        into, out = ctypes.create_string_buffer(frame, len(frame)), ctypes.create_string_buffer(4096)
        attributes = ctypes.create_string_buffer(
            _TEST_RUN.pack(
                self.programs.program_fd(program), 0, len(frame), len(out),
                ctypes.addressof(into), ctypes.addressof(out), 1, *(0,) * 8,
            ),
            _TEST_RUN.size,
        )  # fmt: skip
        result = _libc.syscall(_SYS_BPF, _PROG_TEST_RUN, attributes, _TEST_RUN.size)
        assert result == 0, os.strerror(ctypes.get_errno())
        _, answer, _, out_len, *_ = _TEST_RUN.unpack(attributes.raw)
        return answer, out.raw[:out_len]

    def n_counted(self, name: str) -> int:
        return sum(memoryview(self.programs.counts.read(COUNTS.index(name))).cast("Q"))


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    table = of_the_shortcut(overlay())
    programs = loaded(settings(table), LinkIndexes(1, 1, 1, 1), known_peers(table))
    yield Kernel(table, programs)
    programs.close()


def settings(table: Table) -> ShortcutSettings:
    return ShortcutSettings("lo", IPv4Address(UNDERLAY), PORT, table.own_subnet, table.mtu, carries_ecn=True)


def loaded(of: ShortcutSettings, links: LinkIndexes, peers: KernelPeers) -> Programs:
    programs = Programs.load(0)
    programs.configure(of, links)
    for key, value in peers.changes():
        programs.set_peer(key, value)
    programs.keep_on(3600)
    return programs


def frame(
    payload: bytes,
    source: str = NEAR,
    *,
    tos: int = 0,
    check: int = 0,
    ident: int = 0x7000,
    udp_len: int | None = None,
    ports: tuple[int, int] = (PORT, PORT),
    destination: str = UNDERLAY,
    trailer: bytes = b"",
    **outer: object,
) -> bytes:
    """An Ethernet frame with a datagram of the tunnel."""
    datagram = struct.pack(">HHHH", *ports, 8 + len(payload) if udp_len is None else udp_len, check) + payload
    packet = ipv4(source, destination, datagram, tos=tos, ident=ident, **outer)  # type: ignore[arg-type]
    return bytes(12) + b"\x08\x00" + packet + trailer


OF_ANOTHER_TEST = {
    "source-an-address-of-ours-that-the-peer-leases",
    "a-pods-datagram-to-our-socket-on-a-leased-address",
}
"""The kernel never knows such a peer."""
TEST_RUN_MAX = 3000
"""What BPF_PROG_TEST_RUN takes is less than a page, bytes."""


def cases(them: list[Bad]) -> list[Bad]:
    """Those that are packets, as far as these tests can make them."""
    return [it for it in them if it.slug not in OF_ANOTHER_TEST and len(it.packet) < TEST_RUN_MAX]


@pytest.mark.parametrize("case", cases(DECAP), ids=lambda case: case.slug)
def test_bad_packets_of_peers_are_left_to_the_worker(kernel: Kernel, case: Bad) -> None:
    """Those too that one value of SourceCheck lets in: nothing is taken that any of them refuses."""
    answer, after = kernel.decap(frame(case.packet, case.source))
    assert (answer, after) == (PASS, frame(case.packet, case.source))


TAKEN = {
    *("udp", "udp-without-a-checksum", "tcp", "tcp-syn", "icmp-error", "ttl-2", "ttl-255", "tos-and-ecn"),
    *("congestion-experienced", "as-large-as-the-mtu", "to-our-tunnel-address", "to-the-first-of-our-subnet"),
    *("to-the-last-of-our-subnet", "from-the-tunnel-address-of-the-peer", "from-a-narrow-peer"),
    *("from-the-first-lease-of-a-host-with-two", "tcp-too-short-for-a-header"),
}
"""Of GOOD_DECAP; the others have options, are fragments, very short, or from where no lease says."""


@pytest.mark.parametrize("slug", GOOD_DECAP)
def test_good_packets_of_peers_are_taken_as_the_worker_takes_them_or_left_to_it(kernel: Kernel, slug: str) -> None:
    packet, source = GOOD_DECAP[slug]
    answer, after = kernel.decap(frame(packet, source))
    if slug not in TAKEN:
        assert (answer, after) == (PASS, frame(packet, source))
        return
    for check in ("off", "peer", "strict"):
        table = replace(kernel.table, source_check=check)  # type: ignore[arg-type]
        outcome = decap(table, packet, IPv4Address(source), PORT)
        assert outcome.counter == "decap_delivered"
        assert (answer, after[14:]) == (REDIRECT, outcome.writes[0][len(NO_VNET_HDR) :])


_GOOD = udp(NEAR_POD, POD, b"a good packet")
OUTER = {
    "header-checksum-wrong": frame(_GOOD, checksum=1),
    "fragment": frame(_GOOD, flags="MF"),
    "last-fragment": frame(_GOOD, offset=64),
    "options": frame(_GOOD, options=bytes(4)),
    "udp-length-too-short": frame(_GOOD, udp_len=7 + len(_GOOD)),
    "udp-length-too-long": frame(_GOOD, udp_len=9 + len(_GOOD)),
    "bytes-behind-the-inner-packet": frame(_GOOD + b"x"),
    "bytes-behind-the-outer-packet": frame(_GOOD, trailer=b"x"),
    "with-a-udp-checksum": frame(_GOOD, check=0x1234),
    "of-a-worker": frame(_GOOD, ident=0),
    "of-another-program": frame(_GOOD, ident=0x8000),
    "to-another-port": frame(_GOOD, ports=(PORT, PORT + 1)),
    "to-another-address": frame(_GOOD, destination="192.0.2.2"),
    "to-another-host": b"\2" + frame(_GOOD)[1:],
    "not-ip": frame(_GOOD)[:12] + b"\x08\x06" + frame(_GOOD)[14:],
    "not-udp": frame(_GOOD, protocol=6),
    "cut": frame(_GOOD)[:40],
}


@pytest.mark.parametrize("slug", OUTER)
def test_datagrams_whose_outer_headers_need_thought_are_left_to_the_worker(kernel: Kernel, slug: str) -> None:
    assert kernel.decap(OUTER[slug]) == (PASS, OUTER[slug])


@pytest.mark.parametrize("outer", [NOT_ECT, ECT_1, ECT_0, CE])
@pytest.mark.parametrize("inner", [NOT_ECT, ECT_1, ECT_0, CE])
def test_marks_of_congestion_are_carried_on_as_by_the_worker(kernel: Kernel, inner: int, outer: int) -> None:
    packet = ipv4(NEAR_POD, POD, bytes(64), tos=0xB8 | inner, protocol=50)
    answer, after = kernel.decap(frame(packet, tos=outer))
    outcome = decap(kernel.table, packet, IPv4Address(NEAR), outer_ecn=outer)
    if outcome.writes:
        assert (answer, after[14:]) == (REDIRECT, outcome.writes[0][len(NO_VNET_HDR) :])
    else:
        assert answer == PASS


@pytest.mark.parametrize("outer", [ECT_1, CE])
@pytest.mark.parametrize("inner", [NOT_ECT, ECT_0])
def test_marks_of_congestion_are_carried_on_nowhere_while_ecn_is_disabled(inner: int, outer: int) -> None:
    """`ecn` in OffloadDisabled was obeyed on the way out only."""
    table = of_the_shortcut(overlay())
    programs = loaded(replace(settings(table), carries_ecn=False), LinkIndexes(1, 1, 1, 1), known_peers(table))
    packet = ipv4(NEAR_POD, POD, bytes(64), tos=0xB8 | inner, protocol=50)
    answer, after = Kernel(table, programs).decap(frame(packet, tos=outer))
    programs.close()
    assert (answer, after[14:]) == (
        REDIRECT,
        decap(table, packet, IPv4Address(NEAR), outer_ecn=NOT_ECT).writes[0][len(NO_VNET_HDR) :],
    )


@pytest.mark.parametrize(
    ("ago_s", "expected"),
    [(-60, (PASS, 1)), (3, (REDIRECT, 0))],
    ids=["another processor is ahead", "long ago"],
)
def test_nothing_overtakes_a_super_packet_that_another_processor_has_just_noted(
    ago_s: int, expected: tuple[int, int]
) -> None:
    """With a clock that was ahead the time since the super-packet was negative, and counted as long ago."""
    table = of_the_shortcut(overlay())
    programs = loaded(settings(table), LinkIndexes(1, 1, 1, 1), KernelPeers(table.own_subnet, table.mtu))
    for key, value in known_peers(table).changes():
        assert value is not None
        programs.set_peer(key, used(value, super_ns=time.monotonic_ns() - ago_s * 10**9))
    kernel = Kernel(table, programs)
    answer, _ = kernel.decap(frame(_GOOD))
    n_passed = kernel.n_counted("decap_super")
    programs.close()
    assert (answer, n_passed) == expected


def test_what_the_daemon_does_not_look_after_is_left_to_the_worker() -> None:
    """A daemon that is dead or stands still follows no peers, and a filter outlives it."""
    table = of_the_shortcut(overlay())
    programs = loaded(settings(table), LinkIndexes(1, 1, 1, 1), known_peers(table))
    kernel, good = Kernel(table, programs), frame(_GOOD)
    for seconds, expected in ((60, REDIRECT), (-1, PASS), (60, REDIRECT), (-60, PASS)):
        programs.keep_on(seconds)
        assert kernel.decap(good)[0] == expected
    programs.keep_on()
    assert kernel.decap(good)[0] == REDIRECT
    programs.stop()
    assert kernel.decap(good) == (PASS, good)
    n_passed = sum(memoryview(programs.counts.read(COUNTS.index("decap_lapsed"))).cast("Q"))
    programs.close()
    assert n_passed == 3


def test_a_time_namespace_makes_the_programs_time_no_other() -> None:
    """The kernel's clocks have no offset there, and those of a process have."""
    code = "from udptun.kernel.bpf import monotonic_ns; print(monotonic_ns())"
    ahead = ["unshare", "--time", "--fork", "--monotonic", "1000000"]
    try:
        said = subprocess.run([*ahead, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if "unshare" in said.stderr:
        pytest.skip(said.stderr)
    assert abs(time.monotonic_ns() - int(said.stdout)) < 60 * 10**9


# ------------------------------------------------------------------------------------------------------ the detour

VNI, DETOUR_UDP_PORT, MACS = b"\x12\x34\x56\0", (18472).to_bytes(2), bytes.fromhex("024a6f5e21b3062c8d13f7a9")
_OK, _SHOT = 0, 2
_FAR_S = 60


def used(value: bytes, *, n_out: int = 0, super_ns: int = 0, detour_ns: int = 0, out_ns: int = 0) -> bytes:
    """A peer's entry as it is once packets have come."""
    *told, _, _, _, _ = PEER.unpack(value)
    return PEER.pack(*told, n_out, super_ns, detour_ns, out_ns)


@contextmanager
def by_detour(*, since_ns: int = 1, is_on: bool = True, sign: int = 0, **of_peers: int) -> Iterator[Kernel]:
    """The programs with a detour, which all peers take as they have just sent super-packets, or as `of_peers` says.

    `sign`: BPF_PROG_TEST_RUN gives every packet 0.
    """
    table = of_the_shortcut(overlay())
    programs = loaded(settings(table), LinkIndexes(1, 1, 1, 1), KernelPeers(table.own_subnet, table.mtu))
    programs.set_detour(DETOUR.pack(since_ns, is_on, VNI, DETOUR_UDP_PORT, MACS, sign))
    for key, value in known_peers(table).changes():
        assert value is not None
        programs.set_peer(key, used(value, **{"detour_ns": time.monotonic_ns() + _FAR_S * 10**9, **of_peers}))
    yield Kernel(table, programs)
    programs.close()


def in_detour(written: bytes, source: str) -> bytes:
    """What the host gets of a packet that the worker would write like this."""
    vxlan = bytes.fromhex("08000000") + VNI + MACS + b"\x08\x00" + written
    datagram = DETOUR_UDP_PORT * 2 + (8 + len(vxlan)).to_bytes(2) + bytes(2) + vxlan
    return bytes(12) + b"\x08\x00" + ipv4(source, UNDERLAY, datagram, ident=0x7000)


def test_what_takes_the_detour_has_passed_the_same_checks_and_comes_out_as_the_worker_writes_it() -> None:
    with by_detour() as kernel:
        for case in cases(DECAP):
            whole = frame(case.packet, case.source)
            assert (case.slug, *kernel.decap(whole)) == (case.slug, PASS, whole)
        for slug, whole in OUTER.items():
            assert (slug, *kernel.decap(whole)) == (slug, PASS, whole)
        for n, slug in enumerate(sorted(TAKEN), 1):
            packet, source = GOOD_DECAP[slug]
            written = decap(kernel.table, packet, IPv4Address(source), PORT).writes[0][len(NO_VNET_HDR) :]
            assert (slug, *kernel.decap(frame(packet, source))) == (slug, _OK, in_detour(written, source))
            inner = MACS + b"\x08\x00" + written
            assert (slug, *kernel.decap(inner, "arrive")) == (slug, REDIRECT, inner)
            assert kernel.n_counted("decap_packets") == kernel.n_counted("decap_delivered") == n
            assert kernel.n_counted("detour_sent") == kernel.n_counted("detour_arrived") == n


def test_marks_of_congestion_are_carried_on_once_by_the_detour() -> None:
    """The VXLAN device would do it again."""
    with by_detour() as kernel:
        for inner, outer in product([NOT_ECT, ECT_1, ECT_0, CE], repeat=2):
            packet = ipv4(NEAR_POD, POD, bytes(64), tos=0xB8 | inner, protocol=50)
            outcome = decap(kernel.table, packet, IPv4Address(NEAR), outer_ecn=outer)
            answer, after = kernel.decap(frame(packet, tos=outer))
            if outcome.writes:
                assert (answer, after) == (_OK, in_detour(outcome.writes[0][len(NO_VNET_HDR) :], NEAR))
            else:
                assert answer == PASS


def test_only_what_decap_has_sent_comes_out_of_the_detour() -> None:
    """Each bit of the addresses counts, and nothing but IPv4 passes."""
    with by_detour() as kernel:
        good = MACS + b"\x08\x00" + _GOOD
        for bit in range(8 * len(MACS)):
            wrong = bytearray(good)
            wrong[bit // 8] ^= 1 << bit % 8
            assert kernel.decap(bytes(wrong), "arrive")[0] == _SHOT
        assert kernel.decap(MACS + b"\x86\xdd" + _GOOD, "arrive")[0] == _SHOT
        assert kernel.n_counted("detour_refused") == 8 * len(MACS) + 1
        assert kernel.n_counted("decap_delivered") == 0
        assert kernel.decap(good, "arrive")[0] == REDIRECT


def test_who_has_read_the_addresses_in_an_icmp_error_gets_nothing_in() -> None:
    """A rule that rejects a few of the detour's packets has them told to a peer, whose fragments `decap` lets by.

    The sign is beside the packet.  And nothing comes out that is not from a peer to our subnet.
    """
    with by_detour(sign=1) as kernel:
        assert kernel.decap(MACS + b"\x08\x00" + _GOOD, "arrive")[0] == _SHOT
    with by_detour() as kernel:
        for source, destination in (("10.244.77.7", POD), (NEAR_POD, "10.244.77.7")):
            inner = ipv4(source, destination, bytes(64), protocol=50)
            assert kernel.decap(MACS + b"\x08\x00" + inner, "arrive")[0] == _SHOT
        assert kernel.n_counted("detour_refused") == 2


def test_nothing_comes_out_where_there_is_no_detour() -> None:
    """All of its map is zero then, and a packet of zeros was taken."""
    with by_detour() as kernel:
        kernel.programs.set_detour(bytes(DETOUR.size))
        assert kernel.decap(bytes(12) + b"\x08\x00" + _GOOD, "arrive")[0] == _SHOT
        to_port_0 = frame(bytes(64), ports=(40000, 0))
        assert kernel.decap(to_port_0) == (PASS, to_port_0)


def test_a_stranger_with_the_vni_gets_no_further_than_the_underlay_and_others_may_have_the_port() -> None:
    """A masqueraded connection may have it."""
    vxlan = bytes.fromhex("08000000") + VNI + MACS + b"\x08\x00" + _GOOD
    with by_detour() as kernel:
        ports = (40000, int.from_bytes(DETOUR_UDP_PORT))
        assert kernel.decap(frame(vxlan, ports=ports))[0] == _SHOT
        for other in (frame(vxlan[:4] + b"\x12\x34\x57" + vxlan[7:], ports=ports), frame(b"hello", ports=ports)):
            assert kernel.decap(other) == (PASS, other)
        assert kernel.n_counted("detour_refused") == 1


@pytest.mark.parametrize(
    ("of_peers", "expected"),
    [
        ({"is_on": False}, REDIRECT),
        ({"detour_ns": 0}, REDIRECT),
        ({"detour_ns": 1}, REDIRECT),
        ({"super_ns": -1}, PASS),
        ({"super_ns": -1, "since_ns": -1}, _OK),
        ({"super_ns": -1, "is_on": False}, PASS),
        ({"n_out": 2, "out_ns": 1}, _OK),
        ({"n_out": 3, "out_ns": 1}, PASS),
        ({"n_out": 1000, "out_ns": -1}, _OK),
    ],
    ids=[
        *("off", "no super-packet", "none for a while", "the worker has just got one"),
        *("the worker got one before the detour was there", "and there is none any more"),
        *("two are late", "three are late", "many have just gone in"),
    ],
)
def test_which_way_the_packets_of_a_peer_go(of_peers: dict[str, int], expected: int) -> None:
    """-1: now.  Where the peer's super-packets went another way a moment ago, others would overtake them."""
    now_ns = time.monotonic_ns()
    with by_detour(**{name: now_ns if value == -1 else value for name, value in of_peers.items()}) as kernel:  # type: ignore[arg-type]
        assert kernel.decap(frame(_GOOD))[0] == expected
        if of_peers.get("n_out") == 3:
            # And so do those after it.
            assert kernel.decap(frame(_GOOD))[0] == PASS
            assert (kernel.n_counted("detour_late"), kernel.n_counted("decap_super")) == (1, 2)


# ------------------------------------------------------------------------------------------------------------------


def test_a_peer_in_whose_subnet_this_host_has_an_address_is_left_to_the_worker() -> None:
    """Its packets may come from that address, and ours to it may be the tunnel's own."""
    peers = known_peers(overlay())
    keys = {IPv4Address(key) for key, value in peers.changes() if value is not None}
    assert IPv4Address("10.244.4.0") in keys
    assert IPv4Address("10.244.2.0") not in keys


def test_an_entry_that_has_just_become_another_peers_lets_nothing_in() -> None:
    """The kernel gives the place of a replaced entry to the next one at once, while a program may look at it.

    Then the packets of one peer were held against the address of another one.
    """
    table = of_the_shortcut(overlay())
    values = {IPv4Address(key): value for key, value in known_peers(table).changes() if value is not None}
    near, other = (next(it for it in table.peers if IPv4Address(of) in it.subnet) for of in (NEAR_POD, "10.244.3.1"))
    key = near.subnet.network_address
    programs = loaded(settings(table), LinkIndexes(1, 1, 1, 1), KernelPeers(table.own_subnet, table.mtu))
    kernel = Kernel(table, programs)
    from_other, from_near = frame(_GOOD, str(other.remote[0])), frame(_GOOD)
    programs.set_peer(key.packed, values[other.subnet.network_address])
    answers = [kernel.decap(it) for it in (from_other, from_near)]
    n_passed = kernel.n_counted("decap_source")
    programs.set_peer(key.packed, values[key])
    answer, _ = kernel.decap(from_near)
    programs.close()
    assert answers == [(PASS, from_other), (PASS, from_near)]
    assert (n_passed, answer) == (2, REDIRECT)


def test_after_a_thousand_changes_of_ten_thousand_peers_the_kernel_has_what_the_table_has() -> None:
    """Nothing stale, nothing missing: each entry is read back."""
    random = Random(1)
    programs, peers = Programs.load(10_000), KernelPeers(IPv4Network("10.255.255.0/24"), MTU)
    subnets = [IPv4Network((0x0A000000 | n << 8, 24)) for n in range(10_000)]
    wanted: dict[IPv4Network, int] = {}

    def change(subnet: IPv4Network, host: int) -> None:
        """`host` 0: the peer goes."""
        remote = Remote(IPv4Address(0xC0000000 | host), PORT, True, takes_shortcut=True)
        peers.set_peer(subnet, PeerEntry(remote, 1, MTU, is_dead=False) if host else None)
        wanted[subnet] = host

    for host, subnet in enumerate(subnets, 1):
        change(subnet, host)
    for _ in range(1001):
        for key, value in peers.changes():
            programs.set_peer(key, value)
        change(random.choice(subnets), random.choice((0, random.randrange(1, 1 << 16))))
    for key, value in peers.changes():
        programs.set_peer(key, value)
    for subnet, host in wanted.items():
        key, value = int.from_bytes(subnet.network_address.packed, sys.byteorder), b""
        with suppress(KernelError):
            value = programs.peers.read(key)
        assert int.from_bytes(value[4:8]) == (0xC0000000 | host if host else 0)
    programs.close()


# ---------------------------------------------------------------------------------------------------- to the peers

THERE = IPv4Address("192.0.2.200")
"""Where the peers are: on the far end of the underlay."""
WHERE = {"10.244.4.0/24": IPv4Address("192.0.2.201")}
"""But this one, whose MAC address is not known."""


_TC_ACT_SHOT = 2
_FLOW_GAP_S = 0.021
"""After so long a gap the programs take a flow again."""


class Ground:
    """In a namespace v0 -- v1: the TUN device, and the programs between it and the underlay.  Made and used inside.

    `by` tcx or clsact.
    """

    def __init__(self, by: str) -> None:
        self._by = by
        self.table = replace(
            of_the_shortcut(overlay()),
            peers=tuple(replace(it, remote=(WHERE.get(str(it.subnet), THERE), PORT)) for it in overlay().peers),
        )
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        self._tun = open_queues("flannel0", 1)
        Path("/proc/sys/net/ipv6/conf/flannel0/disable_ipv6").write_text("1")
        for command in ("link set flannel0 mtu 1472 up", f"neigh add {THERE} lladdr 02:00:00:00:00:99 dev v0"):
            subprocess.run(["ip", *command.split()], check=True)
        underlay, device = (socket.if_nametoindex(name) for name in ("v0", "flannel0"))
        links = LinkIndexes(underlay, device, underlay, underlay)
        # Of another network on the same underlay: they stand before ours, and nothing is theirs.
        other = replace(settings(self.table), port=PORT + 1)
        self._others = loaded(other, links, KernelPeers(self.table.own_subnet, MTU))
        self.programs = loaded(settings(self.table), links, known_peers(self.table))
        self._links = list[int]()
        for name, index, hook in (("encap", device, Hook.EGRESS), ("decap", underlay, Hook.INGRESS)):
            for it in (self._others, self.programs):
                if by == "tcx":
                    self._links.append(attach(it.program_fd(name), index, hook))
                else:
                    asyncio.run(attach_filter("udptun", name, it.program_fd(name), index, hook))
        self._into = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._into.bind(("flannel0", socket.htons(ETH_P_IP)))
        self._far = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IP))
        self._far.bind(("v1", ETH_P_IP))

    def send(self, packet: bytes) -> tuple[str, bytes]:
        """Where the packet came out, `wire` or `worker`, and what came out."""
        self._into.sendto(packet, ("flannel0", ETH_P_IP))
        return self._receive()

    def send_together(self, packets: list[bytes]) -> tuple[list[str], float]:
        """Where each packet came out, in the order in which they were found, and in how many seconds all were sent."""
        began_s = time.monotonic()
        for packet in packets:
            self._into.sendto(packet, ("flannel0", ETH_P_IP))
        took_s = time.monotonic() - began_s
        return [self._receive()[0] for _ in packets], took_s

    def _receive(self) -> tuple[str, bytes]:
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            with suppress(BlockingIOError):
                return "worker", os.read(self._tun.fds[0], 65600)[len(NO_VNET_HDR) :]
            with suppress(BlockingIOError):
                return "wire", self._far.recv(65600, socket.MSG_DONTWAIT)
            select.select([self._far, *self._tun.fds], [], [], 1)
        raise AssertionError("it came out nowhere")

    def takes(self, frame: bytes) -> bool:
        """Whether `decap` takes this one, which comes in by the underlay."""
        before = self._n_counted("decap_packets")
        self._far.send(frame)
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            if self._n_counted("decap_packets") > before:
                return True
            time.sleep(0.001)
        return False

    def reaches_a_program_behind(self, packet: bytes) -> bool:
        """Whether one that is attached last, and drops everything, gets this packet: the sender is told of the drop."""
        with ExitStack() as undo:
            if self._by == "tcx":
                drop = struct.pack("=BBhiBBhi", 0xB7, 0, 0, _TC_ACT_SHOT, 0x95, 0, 0, 0)
                dropping = load_program("ut_test_drop", drop)
                undo.callback(os.close, dropping)
                undo.callback(os.close, attach(dropping, socket.if_nametoindex("flannel0"), Hook.EGRESS))
            else:
                behind = ["dev", "flannel0", "egress", "prio", "65000"]
                what = ["protocol", "all", "bpf", "da", "bytecode", f"1,6 0 0 {_TC_ACT_SHOT},"]
                subprocess.run(["tc", "filter", "add", *behind, *what], check=True)
                undo.callback(subprocess.run, ["tc", "filter", "delete", *behind], check=True)
            try:
                self._into.sendto(packet, ("flannel0", ETH_P_IP))
            except OSError as exc:
                return exc.errno == errno.ENOBUFS
        return False

    def _n_counted(self, name: str) -> int:
        return sum(memoryview(self.programs.counts.read(COUNTS.index(name))).cast("Q"))

    def close(self) -> None:
        for it in self._links:
            os.close(it)
        self.programs.close()
        self._others.close()
        self._into.close()
        self._far.close()
        self._tun.close()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("tcx", marks=pytest.mark.skipif(not HAS_TCX, reason="needs a kernel with tcx, 6.6 or later")),
        "clsact",
    ],
)
def ground(request: pytest.FixtureRequest) -> Iterator[tuple[Namespace, Ground]]:
    with linked_namespace() as ns:
        it = ns.call(lambda: Ground(request.param))
        yield ns, it
        it.close()


@pytest.fixture
def on_the_ground(ground: tuple[Namespace, Ground]) -> Callable[[bytes], tuple[str, bytes]]:
    """Sends a packet into the device; says where it came out."""
    ns, it = ground
    return lambda packet: ns.call(lambda: it.send(packet))


SENT = {
    *("udp", "tcp", "icmp-error", "bare-header", "ttl-2", "ttl-255", "tos-and-ecn", "congestion-experienced", "df"),
    *("source-outside-network", "source-our-tunnel-address", "to-the-tunnel-address-of-the-peer"),
    "to-the-last-address-of-a-lease",
}
"""Of GOOD_ENCAP; the others have options, are fragments, go to a narrow peer or to a subnet of another length, or to a
host whose MAC address is not known: those went out without an Ethernet header."""


@pytest.mark.parametrize("slug", GOOD_ENCAP)
def test_packets_to_peers_leave_as_the_worker_sends_them_or_by_it(
    on_the_ground: Callable[[bytes], tuple[str, bytes]], slug: str
) -> None:
    packet = GOOD_ENCAP[slug]
    if slug in SENT:
        # Another test may have sent what belongs to the same flow and is the worker's.
        time.sleep(_FLOW_GAP_S)
    where, out = on_the_ground(packet)
    if slug not in SENT:
        assert (where, out) == ("worker", packet)
        return
    table = of_the_shortcut(overlay())
    (outcome,) = encap(table, NO_VNET_HDR + packet)
    ((_, payload),) = outcome.sends
    peer = table.leasing(IPv4Address(packet[16:20]))
    assert peer is not None
    expected = ipv4(
        UNDERLAY,
        str(THERE),
        struct.pack(">HHHH", PORT, PORT, 8 + len(payload), 0) + payload,
        tos=outer_tos(peer, packet),
        ident=0x7000,
        flags="DF",
    )
    assert (where, out[:6], out[14:]) == ("wire", bytes.fromhex("020000000099"), expected)


@pytest.mark.parametrize("case", [it for it in cases(ENCAP) if len(it.packet) >= 20], ids=lambda it: it.slug)
def test_bad_packets_to_peers_reach_the_worker_unchanged(
    on_the_ground: Callable[[bytes], tuple[str, bytes]], case: Bad
) -> None:
    assert on_the_ground(case.packet) == ("worker", case.packet)


def test_what_follows_a_packet_for_the_worker_does_not_overtake_it(ground: tuple[Namespace, Ground]) -> None:
    """The kernel sent it at once, and the fragment before it a wake-up later."""
    ns, it = ground
    fragment, same, other = GOOD_ENCAP["fragment"], GOOD_ENCAP["udp"], GOOD_ENCAP["tcp"]
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        time.sleep(_FLOW_GAP_S)
        assert ns.call(lambda: it.send(same))[0] == "wire"
        came_out, took_s = ns.call(lambda: it.send_together([fragment, same, other]))
        if took_s < _FLOW_GAP_S / 2:
            assert came_out == ["worker", "worker", "wire"]
            return
    raise AssertionError("this machine is too busy to send three packets in 10 ms")


def test_programs_behind_ours_see_every_packet_that_ours_leave(ground: tuple[Namespace, Ground]) -> None:
    """Ours ended the chain: other programs and filters of the underlay were without effect for every packet."""
    ns, it = ground
    assert ns.call(lambda: it.reaches_a_program_behind(GOOD_ENCAP["fragment"]))
    assert ns.call(lambda: it.reaches_a_program_behind(ipv4(POD, "198.51.100.1", bytes(8))))
    time.sleep(_FLOW_GAP_S)
    assert not ns.call(lambda: it.reaches_a_program_behind(GOOD_ENCAP["udp"]))


def test_two_networks_on_one_underlay_get_their_datagrams(ground: tuple[Namespace, Ground]) -> None:
    """Those of the second went to its workers.  (That its packets leave is what the other tests here see.)"""
    ns, it = ground
    address = ns.show("link show v0")[0]["address"]
    datagram = bytes.fromhex(address.replace(":", "")) + frame(_GOOD, str(THERE))[6:]
    assert ns.call(lambda: it.takes(datagram))


def test_the_documented_capabilities_are_enough() -> None:
    """Without CAP_PERFMON the verifier refused `encap`: it gave helpers padding that was never written."""
    code = "from udptun.datapath.shortcut.programs import find_lack; print(repr(find_lack()))"
    rights = ["setpriv", "--bounding-set=-all,+bpf,+net_admin", "--inh-caps=-all"]
    done = subprocess.run([*rights, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("''", "")

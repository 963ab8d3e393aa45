"""Peers that are reached over IPv6: by a host with IPv6 alone, and by one that has sockets of both families.

    [socketpair = TUN] --> Worker --> sockets on [fd00::1], and on 127.0.0.1 beside --> peers: sockets of the test

All in a namespace whose lo has the addresses.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from pathlib import Path

import pytest

from tests.datapath.harness import DEADLINE_S, of_packets
from tests.datapath.test_processes import until
from tests.namespace import Namespace, namespace, requires_netns
from tests.packets import (
    GSO_UDP_L4,
    MTU,
    NEEDS_CSUM,
    NO_VNET_HDR,
    OWN,
    PARTIAL,
    POD,
    icmp_answer,
    icmp_answer_to_peer,
    icmp_message,
    ipv4,
    pattern,
    stepped,
    udp,
    udp_segment,
    vnet_hdr,
    with_header_checksum,
)
from tests.udp_sockets import n_waiting
from udptun import _fastpath
from udptun.core.offload import ALL
from udptun.core.tunnel import SourceCheck
from udptun.datapath import strangers
from udptun.datapath.rings import Rings
from udptun.datapath.settings import PacketSettings, Remote, Where
from udptun.datapath.sockets import address_of, choose_socket, open_senders, open_sockets, set_offload
from udptun.datapath.stats import Stats
from udptun.datapath.strangers import StrangerFilter
from udptun.datapath.table import TableWriter
from udptun.datapath.tunnel import Tunnel

pytestmark = [requires_netns, pytest.mark.netns]

HERE, PEER, STRANGER = (IPv6Address(f"fd00::{n}") for n in (1, 2, 9))
HERE_IPV4, OTHER_IPV4, OTHER_IPV6 = IPv4Address("127.0.0.1"), IPv4Address("127.0.0.3"), IPv6Address("fd00::3")
PEER_SUBNET, PEER_POD = IPv4Network("10.244.2.0/24"), "10.244.2.10"
OTHER_SUBNET, OTHER_POD = IPv4Network("10.244.3.0/24"), "10.244.3.10"
PUNT_ID = 4711
Place = tuple[IPv4Address | IPv6Address, IPv6Address | None, int]
"""An address, one of IPv6 beside it, and the number of workers."""
ECT_0, CE = 2, 3


class Rig:
    """One worker, turned by hand, with a peer at PEER and another one: over IPv4 where `is_beside`, else over IPv6."""

    def __init__(self, undo: ExitStack, ns: Namespace, *, is_beside: bool) -> None:
        self._undo, self._ns = undo, ns
        self.tun, self._worker_tun = (undo.enter_context(end) for end in socket.socketpair(type=socket.SOCK_DGRAM))
        for end in (self.tun, self._worker_tun):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        own = self.in_ns(lambda: open_sockets(HERE_IPV4, 8285, 1)) if is_beside else []
        ipv6 = self.in_ns(lambda: open_sockets(HERE, 8285, 1))
        first = (own or ipv6)[0]
        self.senders = self.in_ns(lambda: open_senders(HERE_IPV4 if is_beside else HERE, 2))
        self.ipv6_senders = self.in_ns(lambda: open_senders(HERE, 2)) if is_beside else self.senders
        for them in filter(None, (own, ipv6)):
            set_offload(them, ALL)
        self.other_address = OTHER_IPV4 if is_beside else OTHER_IPV6
        self.peer, self.other, self.stranger = map(self.bound, (PEER, self.other_address, STRANGER))
        self.table, self.stats = TableWriter.create(), Stats.create()
        undo.callback(self.table.close)
        undo.callback(self.stats.close)
        self.settings = PacketSettings(
            IPv4Network("10.244.0.0/16"),
            IPv4Network(f"{OWN}/24"),
            HERE_IPV4 if is_beside else HERE,
            MTU,
            SourceCheck.PEER,
            punt_id=PUNT_ID,
            port=8285,
        )
        self.table.configure(self.settings)
        places = ((PEER_SUBNET, self.peer, PEER), (OTHER_SUBNET, self.other, self.other_address))
        for subnet, at, address in places:
            remote = Remote(address, at.getsockname()[1], True, takes_any_source_port=True, carries_ecn=True)
            self.table.set_peer(subnet, remote, MTU)
        self.publish()
        self.rings = Rings(self.stats, ())
        fds = (self._worker_tun.fileno(), first.fileno(), [it.fileno() for it in self.senders])
        ipv6_fd = ipv6[0].fileno() if is_beside else -1
        ipv6_senders = [it.fileno() for it in self.ipv6_senders] if is_beside else []
        self.worker = _fastpath.Worker(
            self.table.fd, self.stats.fd, 0, *fds, ipv6_fd=ipv6_fd, ipv6_senders=ipv6_senders
        )
        undo.callback(self.forget_worker)

    def forget_worker(self) -> None:
        del self.worker

    def in_ns(self, make: object) -> list[socket.socket]:
        opened: list[socket.socket] = self._ns.call(make)  # type: ignore[arg-type]
        return [self._undo.enter_context(udp) for udp in opened]

    def bound(self, address: IPv4Address | IPv6Address) -> socket.socket:
        def make() -> list[socket.socket]:
            udp = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
            udp.bind((str(address), 0))
            udp.settimeout(DEADLINE_S)
            return [udp]

        return self.in_ns(make)[0]

    def publish(self) -> None:
        assert self.table.publish(self.stats)

    def turn(self) -> dict[str, int]:
        """The counters that a turn has moved."""
        before = self.stats.counters()
        assert self.worker.turn()
        return {name: n - before[name] for name, n in of_packets(self.stats.counters()).items() if n != before[name]}

    def from_peer(self, packet: bytes, source: socket.socket | None = None, tos: int = 0) -> None:
        control = [(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, struct.pack("i", tos))] * bool(tos)
        (source or self.peer).sendmsg([packet], control, 0, (str(HERE), 8285))

    def written(self) -> list[bytes]:
        """What has come out of the TUN."""
        found = []
        while True:
            try:
                found.append(self.tun.recv(1 << 17))
            except BlockingIOError:
                return found


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as undo:
        yield undo


@pytest.fixture(scope="module")
def ns() -> Iterator[Namespace]:
    with namespace() as ns:
        for address in (HERE, PEER, OTHER_IPV6, STRANGER):
            ns.add_ipv6(f"{address}/128", "lo")
        yield ns


@pytest.fixture(params=[False, True], ids=["alone", "beside"])
def rig(undo: ExitStack, ns: Namespace, request: pytest.FixtureRequest) -> Rig:
    return Rig(undo, ns, is_beside=request.param)


def out_of(packet: bytes) -> bytes:
    return NO_VNET_HDR + packet


def test_a_super_packet_leaves_as_one_train_with_its_mark(rig: Rig) -> None:
    """IPV6_TCLASS goes with the message, beside the segment size."""
    rig.peer.setsockopt(socket.SOL_UDP, 104, 1)  # UDP_GRO
    rig.peer.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
    segment = udp_segment(POD, PEER_POD, pattern(5 * 1000), check=PARTIAL)
    header = vnet_hdr(flags=NEEDS_CSUM, gso_type=GSO_UDP_L4, hdr_len=28, gso_size=1000, start=20, offset=6)
    rig.tun.send(header + ipv4(POD, PEER_POD, segment, tos=ECT_0))
    assert rig.turn() == {"encap_packets": 5, "encap_sent": 5}
    data, control, _flags, source = rig.peer.recvmsg(1 << 16, 200)
    told = {(level, kind): struct.unpack("i", value)[0] for level, kind, value in control}
    assert len(data) == 5 * 1028
    assert told == {(socket.SOL_UDP, 104): 1028, (socket.IPPROTO_IPV6, socket.IPV6_TCLASS): ECT_0}
    assert source[0] == str(HERE)


def test_each_peer_is_sent_to_and_heard_over_its_own_family(rig: Rig) -> None:
    for pod in (PEER_POD, OTHER_POD, PEER_POD):
        rig.tun.send(out_of(udp(POD, pod, b"to it")))
    rig.from_peer(udp(PEER_POD, POD, b"from it"))
    here = HERE_IPV4 if rig.other.family == socket.AF_INET else HERE
    rig.other.sendto(udp(OTHER_POD, POD, b"from it"), (str(here), 8285))
    assert rig.turn() == {"encap_packets": 3, "encap_sent": 3, "decap_packets": 2, "decap_delivered": 2}
    for udp_socket, n in ((rig.peer, 2), (rig.other, 1)):
        assert len([udp_socket.recv(2000) for _ in range(n)]) == n
    assert sorted(rig.written()) == sorted(
        out_of(stepped(udp(pod, POD, b"from it"))) for pod in (PEER_POD, OTHER_POD)
    )


def test_a_source_is_held_against_the_peers_ipv6_address(rig: Rig) -> None:
    packet = udp(PEER_POD, POD)
    rig.from_peer(packet, rig.stranger)
    assert rig.turn() == {"decap_packets": 1, "decap_drop_unknown_peer": 1}
    (stray,) = rig.stats.strays(1, 0)
    assert (stray.outer, stray.inner) == (STRANGER, IPv4Address(PEER_POD))
    rig.from_peer(udp(OTHER_POD, POD))
    assert rig.turn() == {"decap_packets": 1, "decap_drop_source_spoofed": 1}
    port = rig.stranger.getsockname()[1]
    rig.table.set_learned(PEER_SUBNET, {STRANGER: port})
    rig.publish()
    rig.from_peer(packet, rig.stranger)
    assert rig.turn() == {"decap_packets": 1, "decap_delivered": 1}
    rig.table.set_learned(PEER_SUBNET, {STRANGER: port + 1})
    rig.publish()
    rig.from_peer(packet, rig.stranger)
    assert rig.turn() == {"decap_packets": 1, "decap_drop_unknown_peer": 1}


def test_a_mark_of_congestion_on_the_way_reaches_the_packet_inside(rig: Rig) -> None:
    packet = ipv4(PEER_POD, POD, udp_segment(PEER_POD, POD), tos=ECT_0)
    rig.from_peer(packet, tos=CE)
    rig.turn()
    assert rig.written() == [out_of(stepped(with_header_checksum(packet[:1] + bytes([CE]) + packet[2:])))]


def test_what_comes_to_its_end_here_is_answered_over_ipv6(rig: Rig) -> None:
    packet = udp(PEER_POD, POD, b"ends here", ttl=1)
    rig.from_peer(packet)
    assert rig.turn() == {"decap_packets": 1, "decap_drop_ttl": 1, "icmp_sent": 1}
    assert rig.peer.recv(2000) == icmp_answer_to_peer(11, 0, packet, source=OWN)


def test_the_control_plane_asks_and_is_answered_over_ipv6(rig: Rig) -> None:
    request = ipv4(OWN, str(PEER_SUBNET[0]), icmp_message(8), protocol=1)
    assert rig.rings.inject(request)
    assert rig.turn() == {"inject_packets": 1, "inject_sent": 1}
    data, source = rig.peer.recvfrom(2000)
    assert (data, source[:2]) == (request, (str(HERE), 8285))
    reply = icmp_message(0, rest=struct.pack(">HH", PUNT_ID, 1))
    rig.from_peer(ipv4(str(PEER_SUBNET[0]), OWN, reply, protocol=1))
    assert rig.turn() == {"decap_packets": 1, "decap_punted": 1}
    (punt,) = rig.rings.take_punts()
    assert (punt.outer, punt.outer_port, punt.is_stray) == (PEER, rig.peer.getsockname()[1], False)


def test_a_packet_too_long_for_the_path_is_answered_or_leaves_in_fragments(rig: Rig, ns: Namespace) -> None:
    """The kernel's MTU less 48: an IPv6 header has 20 bytes more."""
    ns.ip("link set lo mtu 1400")
    try:
        long = pattern(1400)
        forbidden = ipv4(POD, PEER_POD, udp_segment(POD, PEER_POD, long), flags="DF")
        rig.tun.send(out_of(forbidden))
        # It asks the kernel by a socket of its own, which belongs to the namespace of the thread.
        assert ns.call(rig.turn) == {"encap_packets": 1, "encap_drop_too_big": 1, "icmp_sent": 1}
        answer = icmp_answer(3, 4, forbidden, source=OWN, next_hop_mtu=1400 - 48)
        assert rig.written() == [out_of(answer)]
        allowed = udp(POD, PEER_POD, long)
        rig.tun.send(out_of(allowed))
        assert rig.turn() == {"encap_packets": 1, "encap_sent": 1}
        assert rig.peer.recv(2000) == stepped(allowed)
    finally:
        ns.ip("link set lo mtu 65536")


def test_flows_over_ipv6_spread_over_as_many_ports_as_those_over_ipv4(rig: Rig) -> None:
    """Before, all of them left from our own port where the host has an address of both families."""
    flows = range(32)
    for _ in range(2):
        for flow in flows:
            rig.tun.send(out_of(ipv4(POD, PEER_POD, udp_segment(POD, PEER_POD, b"x", ports=(2000 + flow, 53)))))
        assert rig.turn() == {"encap_packets": len(flows), "encap_sent": len(flows)}
    ports: dict[bytes, set[int]] = {}
    for _ in range(2 * len(flows)):
        packet, source = rig.peer.recvfrom(2000)
        ports.setdefault(packet[20:22], set()).add(source[1])
    assert all(len(it) == 1 for it in ports.values()), "a flow leaves from one port"
    assert {port for it in ports.values() for port in it} == {udp.getsockname()[1] for udp in rig.ipv6_senders}


async def test_what_comes_over_ipv6_wakes_a_worker_that_sleeps(rig: Rig) -> None:
    thread = threading.Thread(target=rig.worker.run)
    thread.start()
    try:
        await until(lambda: rig.stats.states(1)[0].name == "RUNNING")
        for n in range(1, 4):
            rig.from_peer(udp(PEER_POD, POD))
            await until(lambda n=n: rig.stats.counters()["decap_delivered"] == n)
    finally:
        rig.worker.stop()
        thread.join()


def test_peers_of_a_host_with_both_families_get_shorter_packets_over_ipv6(rig: Rig) -> None:
    """Its device's MTU allows for an IPv4 header."""
    remotes = [Remote(ip_address(address), 8285, True) for address in (str(PEER), str(rig.other_address))]
    is_beside = rig.other_address.version == 4
    assert [rig.settings.less_for(remote) for remote in remotes] == ([20, 0] if is_beside else [0, 0])


def test_strangers_of_both_families_are_kept_from_the_workers_during_a_flood(
    undo: ExitStack, ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each family has a program and a sink; the sum counts both."""
    rig = Rig(undo, ns, is_beside=True)
    sets = [rig.in_ns(lambda here=here: open_sockets(here, 8286, 2)) for here in (HERE_IPV4, HERE)]
    strangers_ipv4 = rig.bound(IPv4Address("127.0.0.9"))
    flood_filter = StrangerFilter(rig.table, rig.stats, lambda: sets)
    undo.callback(flood_filter.end)
    flood_filter.allow(True)
    with monkeypatch.context() as flood:
        flood.setattr(strangers, "FLOOD_PER_S", -1)
        # It opens its sinks in the namespace of the thread.
        ns.call(flood_filter.look)
    assert flood_filter.state == "on"

    def send(source: socket.socket, here: IPv4Address | IPv6Address) -> None:
        for _ in range(500):
            source.sendto(b"x", (str(here), 8286))

    send(rig.other, HERE_IPV4)
    send(rig.peer, HERE)
    assert [sum(map(n_waiting, sockets)) for sockets in sets] == [500, 500]
    send(strangers_ipv4, HERE_IPV4)
    send(rig.stranger, HERE)
    n_in = sum(n_waiting(udp) for sockets in sets for udp in sockets)
    flood_filter.look()
    assert rig.stats.n_strangers + n_in == 1000
    assert n_in < 100
    flood_filter.end()
    send(rig.stranger, HERE)
    assert sum(map(n_waiting, sets[1])) == 500


def test_a_family_whose_program_is_refused_leaves_the_sockets_of_the_other_one_as_they_were(
    undo: ExitStack, ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of IPv4 kept a program with the peers of that moment, which sent others to other workers than before."""
    rig = Rig(undo, ns, is_beside=True)
    sets = [rig.in_ns(lambda here=here: open_sockets(here, 8286, 2)) for here in (HERE_IPV4, HERE)]
    sources = [rig.bound(IPv4Address("127.0.0.9")) for _ in range(32)]

    def workers() -> list[int]:
        """Which of the sockets of IPv4 gets what each of the sources sends."""
        found = []
        for source in sources:
            source.sendto(b"x", (str(HERE_IPV4), 8286))
            found.append([n_waiting(udp) for udp in sets[0]].index(1))
        return found

    def choose(udp: socket.socket, program: bytes) -> None:
        if udp.family == socket.AF_INET6:
            raise OSError(errno.EINVAL, "refused")
        choose_socket(udp, program)

    before = workers()
    flood_filter = StrangerFilter(rig.table, rig.stats, lambda: sets)
    flood_filter.allow(True)
    monkeypatch.setattr(strangers, "FLOOD_PER_S", -1)
    monkeypatch.setattr(strangers, "choose_socket", choose)
    ns.call(flood_filter.look)
    assert flood_filter.state == "off: the kernel refuses it: EINVAL"
    assert workers() == before


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((HERE_IPV4, None, 1), (HERE_IPV4, HERE, 2)),
        ((HERE_IPV4, HERE, 2), (HERE_IPV4, None, 1)),
        ((HERE_IPV4, HERE, 2), (HERE, None, 2)),
        ((HERE, None, 2), (HERE_IPV4, HERE, 1)),
        ((HERE_IPV4, HERE, 1), (HERE_IPV4, PEER, 1)),
    ],
    ids=["gains", "loses", "loses-ipv4", "gains-ipv4", "moves"],
)
def test_a_host_gains_and_loses_a_family_while_its_datapath_goes_on(
    ns: Namespace, tmp_path: Path, before: Place, after: Place
) -> None:
    """The sockets of the family that stays are the same ones, and the next control plane is handed those of both."""
    settings = PacketSettings(
        IPv4Network("10.244.0.0/16"), IPv4Network(f"{OWN}/24"), HERE_IPV4, MTU, SourceCheck.PEER
    )

    async def opened(place: Place) -> Tunnel:
        first, ipv6, n_workers = place
        return await Tunnel.open(tmp_path, "flannel0", Where(first, 8287, ipv6), n_workers)

    def bound_to(tunnel: Tunnel) -> list[list[str]]:
        return [[str(address_of(udp)[0]) for udp in them] for them in tunnel._endpoints.sets]

    def wanted(place: Place) -> list[list[str]]:
        first, ipv6, n_workers = place
        return [[str(address)] * n_workers for address in (first, ipv6) if address is not None]

    async def body() -> None:
        tunnel = await opened(before)
        try:
            tunnel.configure(settings)
            await tunnel.publish()
            await tunnel.start()
            assert bound_to(tunnel) == wanted(before)
            old = {inode(udp): address_of(udp) for udp in tunnel._endpoints.all_sockets}
            first, ipv6, n_workers = after
            await tunnel.rebind(Where(first, 8287, ipv6), n_workers)
            assert bound_to(tunnel) == wanted(after)
            new = {inode(udp): address_of(udp) for udp in tunnel._endpoints.all_sockets}
            staying = {address for address in old.values() if address in new.values()}
            assert {new[it] for it in old.keys() & new.keys()} == staying
            pids = [process.pid for process in tunnel.datapath.processes if process.is_active]
            tunnel.detach()
            tunnel = await opened(after)
            assert [process.pid for process in tunnel.datapath.processes if process.is_active] == pids
            assert {inode(udp): address_of(udp) for udp in tunnel._endpoints.all_sockets} == new
        finally:
            await tunnel.datapath.stop()
            tunnel.detach()

    try:
        ns.call_async(body)
    finally:
        ns.ip("link delete flannel0")


def inode(udp: socket.socket) -> int:
    return os.fstat(udp.fileno()).st_ino

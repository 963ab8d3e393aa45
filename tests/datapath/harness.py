"""One interface over both implementations of docs/wire-format.md.

The fast path gets real UDP sockets on loopback and, for the TUN, one end of a socket pair that keeps packets apart:

    test --feed--> [socketpair = TUN] --> Worker --> UDP 127.0.0.1 --> 127.0.0.2 to .5: the peers, sockets of the test
    test <-drain-- [socketpair = TUN] <-- Worker <-- UDP 127.0.0.1 <-- the peers' sockets, or any other 127/8 address

Tests give and get bare inner packets, whatever the encapsulation.  With VXLAN the harness puts the prefix before all
that the peers send, and checks every bit of the prefix of all that they get.

The peers may send trains (UDP_SEGMENT).  Loopback carries a train whole to a socket with UDP_GRO and cuts it up for one
without.  `assert_same_packets` takes apart again what the worker has merged into one write to the TUN.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, ip_address
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import pytest

from tests import reference
from tests.packets import (
    DEAF,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    NARROW,
    NEAR,
    NO_VNET_HDR,
    OUR_MAC,
    TWIN,
    UNDERLAY,
    WIDE,
    destination_of,
    internet_sum,
    overlay,
    vnet_hdr,
    vxlan,
    with_header_checksum,
)
from tests.reference import Outcome, Peer, Remote, Table

if TYPE_CHECKING:
    from udptun.core.offload import Offload
    from udptun.datapath.judge import Judge
    from udptun.datapath.stats import Stats, Stray
    from udptun.datapath.table import TableWriter

DEADLINE_S = 5.0
"""Loopback delivers in microseconds; the rest is for a busy machine."""

ICMP_BURST = 50
"""Answers a new worker may give at once (docs/wire-format.md)."""

RECEIVE_BUFFER_BYTES = 8 << 20
"""Room for 2,048 datagrams of a super-packet, each with the kernel's bookkeeping."""

CHUNK_BYTES = 100_000
"""How much is put into a socket before the worker runs: less than the default buffers hold."""


TRAIN_DATAGRAMS = 64
TRAIN_BYTES = 65_507 - TRAIN_DATAGRAMS * reference.PREFIX_LEN
"""What every kernel with UDP_SEGMENT takes in one send, with VXLAN too."""

N_SENDERS = 3
"""Sockets that the fast path sends VXLAN from."""

CONTROL_BYTES = 100
"""Room for what the kernel says beside a datagram: the size of those in a train, and the outer TOS."""


@dataclass(frozen=True, slots=True)
class Message:
    """What a peer sends in one system call: a datagram, or a train of them, all `size` bytes but the last."""

    payload: bytes
    source: str
    size: int = 0
    """0: one datagram."""
    ecn: int = reference.NOT_ECT
    """Of the outer packets."""

    @property
    def cut(self) -> list[bytes]:
        """The datagrams."""
        if not self.size or not self.payload:
            return [self.payload]
        return [self.payload[at : at + self.size] for at in range(0, len(self.payload), self.size)]

    def over_vxlan(self, ethertype: int) -> Message:
        """The same packets, each with a prefix; a super-packet that nobody cut has one for all."""
        if reference.datagrams(self.payload, self.size) == [(self.payload, self.size)]:
            return replace(self, payload=vxlan(self.payload, ethertype=ethertype))
        size = self.size + reference.PREFIX_LEN if self.size else 0
        return replace(self, payload=b"".join(vxlan(it, ethertype=ethertype) for it in self.cut), size=size)

    def received(self, *, has_gro: bool, prefix_len: int) -> list[tuple[bytes, int]]:
        """What the worker must find in it: datagrams, and the inner size of those that are super-packets."""
        if has_gro:
            return reference.datagrams(self.payload, self.size, prefix_len)
        return [(payload, 0) for payload in self.cut]


def trains(datagrams: Sequence[tuple[bytes, str]], longest: int = ICMP_BURST) -> list[Message]:
    """The same datagrams, in order, in as few messages of at most `longest` as UDP_SEGMENT allows."""
    messages: list[Message] = []
    run: list[bytes] = []
    for i, (payload, source) in enumerate(datagrams):
        run.append(payload)
        following, sender = datagrams[i + 1] if i + 1 < len(datagrams) else (b"", "")
        if (
            len(run) == min(longest, TRAIN_DATAGRAMS)
            or sender != source
            or not 0 < len(following) <= len(run[0])
            or len(payload) < len(run[0])
            or sum(map(len, run)) + len(following) > TRAIN_BYTES
        ):
            messages.append(Message(b"".join(run), source, len(run[0]) if len(run) > 1 else 0))
            run = []
    return messages


@dataclass
class Batch:
    """What became of several packets: counters that moved, and what came out, in order."""

    counts: dict[str, int] = field(default_factory=dict)
    sends: dict[Remote, list[bytes]] = field(default_factory=dict)
    writes: list[bytes] = field(default_factory=list)
    punts: list[bytes] = field(default_factory=list)

    def add(self, other: Batch) -> None:
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        for remote, payloads in other.sends.items():
            self.sends.setdefault(remote, []).extend(payloads)
        self.writes += other.writes
        self.punts += other.punts

    def outcome(self) -> Outcome:
        """The outcome of the one packet in the batch.  Fails unless exactly one packet was counted, once."""
        beside = [name for name in self.counts if name.startswith("icmp_")]
        ends = [name for name in self.counts if not name.startswith("icmp_") and not name.endswith("_packets")]
        assert len(ends) == 1
        assert len(beside) <= 1
        assert set(self.counts.values()) == {1}
        sends = tuple((remote, payload) for remote, payloads in self.sends.items() for payload in payloads)
        icmp = beside[0] if beside else None
        return Outcome(ends[0], sends, tuple(self.writes), icmp, tuple(self.punts))  # type: ignore[arg-type]


class Datapath(Protocol):
    """What a test can do to either implementation."""

    table: Table

    def configure(self, **changes: object) -> None:
        """Replace fields of `table`, but for the peers, and publish it."""

    def set_overlay(self, network: str, own_subnet: str, leases: Sequence[tuple[str, Peer]]) -> None:
        """Publish another overlay: `leases` are subnets, each with the peer of the old table that holds it now."""

    def encap_batch(self, raws: Sequence[bytes]) -> Batch: ...

    def decap_batch(self, datagrams: Sequence[tuple[bytes, str]], ecn: int = reference.NOT_ECT) -> Batch:
        """Payloads and the outer addresses they come from; `ecn` is that of their outer packets."""

    def decap_messages(self, messages: Sequence[Message]) -> Batch: ...

    def decap_wire(self, messages: Sequence[Message]) -> Batch:
        """As they are, with no prefix put before them."""

    def encap(self, raw: bytes) -> Outcome: ...

    def decap(self, payload: bytes, source: str) -> Outcome: ...

    def inject(self, packet: bytes, *, into_tun: bool = False) -> Outcome:
        """As the control plane does."""

    def break_tun(self) -> None:
        """From now on the TUN refuses every write."""

    @property
    def counters(self) -> dict[str, int]: ...


class ReferenceDatapath:
    """`tests.reference` behind the interface."""

    def __init__(
        self,
        *,
        has_gro: bool = True,
        is_in_trains: bool = False,
        has_vnet_hdr: bool = True,
        is_vxlan: bool = False,
        has_ipv6: bool = False,
    ) -> None:
        """Without virtio headers the device gets the packets of a write one by one."""
        self.table = overlay(is_vxlan=is_vxlan, has_ipv6=has_ipv6)
        self._has_gro, self._is_in_trains = has_gro, is_in_trains
        self.has_vnet_hdr = has_vnet_hdr
        from udptun._fastpath import COUNTERS

        self.counters = of_packets(dict.fromkeys(COUNTERS, 0))
        self._is_tun_broken = False

    def configure(self, **changes: object) -> None:
        self.table = replace(self.table, **changes)  # type: ignore[arg-type]

    def set_overlay(self, network: str, own_subnet: str, leases: Sequence[tuple[str, Peer]]) -> None:
        self.table = _another_overlay(self.table, network, own_subnet, leases)

    def encap_batch(self, raws: Sequence[bytes]) -> Batch:
        total = Batch()
        for raw in raws:
            for outcome in self._encap(raw):
                self._count(total, "encap_packets", outcome)
        return total

    def decap_batch(self, datagrams: Sequence[tuple[bytes, str]], ecn: int = reference.NOT_ECT) -> Batch:
        return self.decap_messages(_messages(datagrams, ecn, is_in_trains=self._is_in_trains))

    def decap_messages(self, messages: Sequence[Message]) -> Batch:
        return self.decap_wire(_on_the_wire(self.table, messages))

    def decap_wire(self, messages: Sequence[Message]) -> Batch:
        total = Batch()
        for message in messages:
            for payload, inner_size in message.received(has_gro=self._has_gro, prefix_len=self.table.prefix_len):
                outcome = self._decap(payload, IPv4Address(message.source), inner_size, message.ecn)
                self._count(total, "decap_packets", outcome)
        return total

    def encap(self, raw: bytes) -> Outcome:
        return self.encap_batch([raw]).outcome()

    def decap(self, payload: bytes, source: str) -> Outcome:
        return self.decap_batch([(payload, source)]).outcome()

    def inject(self, packet: bytes, *, into_tun: bool = False) -> Outcome:
        def ask(*, is_refused: bool) -> Outcome:
            return reference.inject(self.table, packet, into_tun=into_tun, is_refused=is_refused)

        total, outcome = Batch(), ask(is_refused=into_tun and self._is_tun_broken)
        self._count(total, "inject_packets", ask(is_refused=True) if _goes_to_the_deaf(outcome) else outcome)
        return total.outcome()

    def break_tun(self) -> None:
        self._is_tun_broken = True

    def _encap(self, raw: bytes) -> list[Outcome]:
        outcomes = reference.encap(self.table, raw)
        if any(map(_goes_to_the_deaf, outcomes)):
            return reference.encap(self.table, raw, is_refused=True)
        return outcomes

    def _decap(self, payload: bytes, source: IPv4Address, inner_size: int, ecn: int) -> Outcome:
        def ask(*, is_refused: bool) -> Outcome:
            how = {"inner_size": inner_size, "outer_ecn": ecn}
            return reference.decap(self.table, payload, source, **how, is_refused=is_refused)

        outcome = ask(is_refused=self._is_tun_broken)
        return ask(is_refused=True) if _goes_to_the_deaf(outcome) else outcome

    def _count(self, total: Batch, packets: str, outcome: Outcome) -> None:
        one = Batch({packets: 1, outcome.counter: 1}, writes=list(outcome.writes), punts=list(outcome.punts))
        if not self.has_vnet_hdr:
            one.writes = [NO_VNET_HDR + packet for write in outcome.writes for packet in reference.segments(write)]
        if outcome.icmp:
            one.counts[outcome.icmp] = 1
        for remote, payload in outcome.sends:
            one.sends.setdefault(remote, []).append(inner_packet(self.table, remote, payload))
        for name, count in one.counts.items():
            self.counters[name] += count
        total.add(one)


class FastDatapath:
    """`udptun._fastpath` behind the interface: one worker, turned by hand, with sockets all around it.

    A context manager.

    is_bucket_renewed   every 50 ICMP answers a new worker, whose token bucket is full, goes on
    has_gro             the worker's socket has UDP_GRO
    is_in_trains        `decap_batch` sends in trains what it can
    has_vnet_hdr        the TUN has virtio headers; without, they are taken off what `encap_batch` gives, and empty ones
                        are put before what is written
    are_peers_udptun    the leases say that peers are udptun's
    is_vxlan            the worker sends VXLAN, from N_SENDERS sockets
    has_ipv6            it carries IPv6, too; over VXLAN it carries that alone
    """

    def __init__(
        self,
        *,
        is_bucket_renewed: bool = True,
        has_gro: bool = True,
        is_in_trains: bool = False,
        has_vnet_hdr: bool = True,
        are_peers_udptun: bool = True,
        is_vxlan: bool = False,
        has_ipv6: bool = False,
    ) -> None:
        from udptun import _fastpath
        from udptun.datapath.rings import Rings
        from udptun.datapath.stats import Stats
        from udptun.datapath.table import TableWriter

        self._new_rings = Rings
        self._new_worker = _fastpath.Worker
        self._is_bucket_renewed = is_bucket_renewed
        self._has_gro, self._is_in_trains = has_gro, is_in_trains
        self.has_vnet_hdr = has_vnet_hdr
        self._are_peers_udptun = are_peers_udptun
        self._has_ipv6 = has_ipv6
        with ExitStack() as self._undo:
            self._set_up(TableWriter.create(), Stats.create(), is_vxlan=is_vxlan)
            self._undo = self._undo.pop_all()

    def _set_up(self, writer: TableWriter, stats: Stats, *, is_vxlan: bool) -> None:
        self._writer, self.stats = writer, stats
        self.rings = self._new_rings(stats, ())
        self._undo.callback(writer.close)
        self._undo.callback(stats.close)
        # One processor for sender, loopback and receiver: its backlog keeps the order across sockets. It is the one we
        # run on, so that tests which run at the same time spread over all of them.
        cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {ctypes.CDLL(None).sched_getcpu()})
        self._undo.callback(os.sched_setaffinity, 0, cpus)

        self.tun, self._worker_tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (self.tun, self._worker_tun):
            self._undo.enter_context(end)
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.udp = self._bound("127.0.0.1")
        self.senders = [self._bound("127.0.0.1") for _ in range(N_SENDERS * is_vxlan)]
        for sock in (self.udp, *self.senders):
            # The kernel answers EMSGSIZE only to a socket that never lets it fragment.
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
        self.udp.setsockopt(_SOL_UDP, _UDP_GRO, self._has_gro)
        self.udp.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        self._outer = {ip: self._bound(ip) for ip in (NEAR, NARROW, TWIN, WIDE)}
        self._by_remote: dict[Remote, socket.socket] = {}
        ports = {}
        for ip, sock in self._outer.items():
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
            ports[ip] = sock.getsockname()[1]
            self._by_remote[IPv4Address(ip), ports[ip]] = sock
        self.table = overlay(ports, is_vxlan=is_vxlan, has_ipv6=self._has_ipv6)

        self._publish()
        self.renew_worker()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                left = self.collect(n_sends=0)
                assert (left.sends, left.writes) == ({}, []), "something came out that no counter announced"
        finally:
            del self._worker
            self._undo.close()

    @property
    def counters(self) -> dict[str, int]:
        return of_packets(self.stats.counters())

    @property
    def refused(self) -> Offload:
        """What the worker has found that the kernel does not do for it."""
        return self.stats.refused(1)

    def configure(self, **changes: object) -> None:
        self.table = replace(self.table, **changes)  # type: ignore[arg-type]
        self._publish()

    def set_overlay(self, network: str, own_subnet: str, leases: Sequence[tuple[str, Peer]]) -> None:
        for peer in self.table.peers:
            self._writer.remove_peer(peer.subnet)
        assert self._writer.publish(self.stats)
        self.table = _another_overlay(self.table, network, own_subnet, leases)
        self._publish()

    def encap_batch(self, raws: Sequence[bytes]) -> Batch:
        total = Batch()
        for chunk in _chunks(raws, [(1, len(raw)) for raw in raws]):
            before = self._begin(len(chunk))
            for raw in chunk:
                self.tun.send(raw if self.has_vnet_hdr else raw[len(NO_VNET_HDR) :])
            total.add(self._finish(before, "encap_packets", len(chunk)))
        return total

    def decap_batch(self, datagrams: Sequence[tuple[bytes, str]], ecn: int = reference.NOT_ECT) -> Batch:
        return self.decap_messages(_messages(datagrams, ecn, is_in_trains=self._is_in_trains))

    def decap_messages(self, messages: Sequence[Message]) -> Batch:
        return self.decap_wire(_on_the_wire(self.table, messages))

    def decap_wire(self, messages: Sequence[Message]) -> Batch:
        total = Batch()
        for chunk in _chunks(messages, [(len(message.cut), len(message.payload)) for message in messages]):
            total.add(self._decap(chunk))
        return total

    def decap_at_once(self, messages: Sequence[Message]) -> Batch:
        """Put all of them into the socket before the worker takes any; the socket must have room."""
        return self._decap(_on_the_wire(self.table, messages))

    def _decap(self, messages: Sequence[Message]) -> Batch:
        prefix_len = self.table.prefix_len
        n = sum(len(message.received(has_gro=self._has_gro, prefix_len=prefix_len)) for message in messages)
        before = self._begin(n)
        for message in messages:
            self.send(message)
        return self._finish(before, "decap_packets", n)

    def encap(self, raw: bytes) -> Outcome:
        return self.encap_batch([raw]).outcome()

    def decap(self, payload: bytes, source: str) -> Outcome:
        return self.decap_batch([(payload, source)]).outcome()

    def inject(self, packet: bytes, *, into_tun: bool = False) -> Outcome:
        return self.inject_zeros(packet, 0, into_tun=into_tun)

    def inject_zeros(self, packet: bytes, length: int, *, into_tun: bool = False) -> Outcome:
        """Zeros follow `packet`, so that it is as long as that."""
        before = self._begin(1)
        assert self.rings.inject(packet, length, into_tun=into_tun)
        return self._finish(before, "inject_packets", 1).outcome()

    def encap_trains(self, raws: Sequence[bytes], ip: str = NEAR) -> list[tuple[int, int]]:
        """In which messages `raws` leave when the worker reads them at once: (packets, length of all but the last).

        Towards one peer only; the packets themselves are not kept.
        """
        peer = self._outer[ip]
        peer.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        before = self.counters
        for raw in raws:
            self.tun.send(raw)
        assert self._worker.turn()
        n_sent = self.counters["encap_sent"] - before["encap_sent"]
        messages: list[tuple[int, int]] = []
        peer.settimeout(DEADLINE_S)
        while sum(n for n, _size in messages) < n_sent:
            payload, control, _flags, _source = peer.recvmsg(1 << 16, CONTROL_BYTES)
            sizes = [struct.unpack("i", value)[0] for level, _kind, value in control if level == _SOL_UDP]
            (size,) = sizes or [len(payload)]
            messages.append((-(-len(payload) // size), size - self.table.prefix_len))
        peer.setblocking(False)
        peer.setsockopt(_SOL_UDP, _UDP_GRO, 0)
        return messages

    def encap_tos(self, raws: Sequence[bytes], ip: str = NEAR) -> list[int]:
        """The TOS of each outer packet to one peer when the worker reads `raws` at once."""
        before = self.counters["encap_sent"]
        for raw in raws:
            self.tun.send(raw)
        assert self._worker.turn()
        n = self.counters["encap_sent"] - before
        assert select.select([self._outer[ip]], [], [], DEADLINE_S)[0]
        found = [tos for _payload, tos in _drain_udp(self._outer[ip])]
        assert len(found) == n, "loopback has delivered all that was sent"
        return found

    def encap_with_ports(self, raws: Sequence[bytes]) -> list[tuple[bytes, int]]:
        """The packets to NEAR when the worker reads `raws` at once, and the source ports of their datagrams."""
        near = self._outer[NEAR]
        remote = near.getsockname()
        before = self.counters["encap_sent"]
        for raw in raws:
            self.tun.send(raw)
        assert self._worker.turn()
        near.settimeout(DEADLINE_S)
        got = [near.recvfrom(1 << 16) for _ in range(self.counters["encap_sent"] - before)]
        near.setblocking(False)
        return [
            (inner_packet(self.table, (IPv4Address(remote[0]), remote[1]), payload), port)
            for payload, (_ip, port) in got
        ]

    def peer_counts(self, pod: str) -> list[int]:
        """PEER_COUNTERS of the peer that leases `pod`."""
        peer = self.table.leasing(ip_address(pod))
        assert peer is not None
        (counts,) = self.stats.peers([self._writer.index_of(peer.subnet)])
        return counts

    def set_local_addresses(self, addresses: Collection[IPv4Address]) -> int:
        """Publish these as the host's.  Returns how many did not fit."""
        n_left = self._writer.set_local_addresses(addresses)
        assert self._writer.publish(self.stats)
        return n_left

    def judge(self) -> Judge:
        """Says what the worker would do."""
        from udptun.datapath.judge import Judge

        return Judge(self._writer, self.stats)

    def strays(self, since_s: float = 0) -> list[Stray]:
        """What the worker has noted of datagrams that no lease explains."""
        return self.stats.strays(1, since_s)

    def socket_of(self, ip: str) -> socket.socket:
        """The peer's."""
        return self._outer[ip]

    def send(self, message: Message) -> None:
        """Send it as it is, and leave it to the test what becomes of it."""
        if message.source not in self._outer:
            self._outer[message.source] = self._bound(message.source)
        control = []
        if 0 < message.size < len(message.payload):
            control = [(_SOL_UDP, _UDP_SEGMENT, struct.pack("H", message.size))]
        if message.ecn:
            control.append((socket.IPPROTO_IP, socket.IP_TOS, struct.pack("i", message.ecn)))
        self._outer[message.source].sendmsg([message.payload], control, 0, self.udp.getsockname())

    def send_from(self, ip: str, payload: bytes) -> None:
        """Send a datagram, and leave it to the test what becomes of it."""
        self.send(Message(payload, ip))

    def socket_of_any_source(self) -> socket.socket:
        """A socket of the test's that may send from each address of 127/8."""
        return self._bound("0.0.0.0")

    def turn(self) -> bool:
        """One turn of the worker; what comes out is left to the test."""
        return self._worker.turn()

    def break_tun(self) -> None:
        self.tun.close()

    def _bound(self, ip: str) -> socket.socket:
        sock = self._undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind((ip, 0))
        sock.setblocking(False)
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        return sock

    def _publish(self) -> None:
        from udptun.core.offload import ALL, Offload
        from udptun.core.tunnel import SourceCheck
        from udptun.datapath import settings as shared

        table = self.table
        self._writer.configure(
            shared.PacketSettings(
                network=table.network if table.space(reference.IPV4) else None,
                own_subnet=table.own_subnet if table.space(reference.IPV4) else None,
                underlay_address=IPv4Address(UNDERLAY),
                mtu=table.mtu,
                source_check=SourceCheck(table.source_check),
                offload=ALL if self.has_vnet_hdr else ALL & ~Offload.VNET_HDR,
                vtep=None if table.vtep is None else shared.Vtep(table.vtep.vni, table.vtep.mac),
                punt_id=table.punt_id,
                port=table.port,
                network_ipv6=table.network_ipv6,
                own_subnet_ipv6=table.own_subnet_ipv6,
            )
        )
        assert self._writer.set_local_addresses(table.local_addresses) == 0
        for peer in table.peers:
            remote = shared.Remote(
                *peer.remote,
                is_udptun=self._are_peers_udptun,
                takes_any_source_port=table.vtep is not None,
                mac=peer.mac,
                carries_ecn=peer.carries_ecn,
            )
            index = self._writer.set_peer(peer.subnet, remote, peer.mtu)
            if peer.is_dead:
                received = self.stats.received(index)
                self._writer.set_peer(peer.subnet, remote, peer.mtu, is_dead=True, received=received)
        for peer in table.peers:
            learned = {address: port for subnet, address, port in table.learned if subnet == peer.subnet}
            self._writer.set_learned(peer.subnet, learned)
        self._writer.ask(table.learn_id)
        assert self._writer.publish(self.stats), "no worker runs, so none can hold the other slot"

    def renew_worker(self, index: int = 0, *, events: tuple[int, ...] = ()) -> None:
        """Have another worker go on, as a process does in the place of one that is gone."""
        self._worker = self._new_worker(
            *(self._writer.fd, self.stats.fd, index, self._worker_tun.fileno(), self.udp.fileno()),
            [sock.fileno() for sock in self.senders],
            events=events,
        )
        self._n_answers = 0

    def stop(self) -> None:
        """From now on the worker waits for nothing."""
        self._worker.stop()

    def _begin(self, n_packets: int) -> dict[str, int]:
        """Make sure that the bucket holds an answer for each packet; return the counters."""
        if self._is_bucket_renewed and self._n_answers + n_packets > ICMP_BURST:
            self.renew_worker()
        return self.counters

    def _finish(self, before: dict[str, int], packets: str, n: int) -> Batch:
        """Run the worker until `packets` has grown by `n` and nothing is left to read; collect what came out."""
        deadline = time.monotonic() + DEADLINE_S
        while self._worker.turn() or self.counters[packets] < before[packets] + n:
            assert time.monotonic() < deadline, f"{packets} has not grown by {n}"
        after = self.counters
        counts = {name: after[name] - before[name] for name in after if after[name] != before[name]}
        answers = counts.get("icmp_sent", 0)
        self._n_answers += answers
        n_sends = sum(counts.get(name, 0) for name in ("encap_sent", "inject_sent"))
        batch = self.collect(n_sends + (answers if packets == "decap_packets" else 0))
        batch.counts = counts
        return batch

    def collect(self, n_sends: int) -> Batch:
        """Everything that has come out, once `n_sends` datagrams have."""
        batch = Batch()
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for remote, sock in self._by_remote.items():
                if payloads := [self._taken_out(remote, payload, tos) for payload, tos in _drain_udp(sock)]:
                    batch.sends.setdefault(remote, []).extend(payloads)
            got = sum(len(payloads) for payloads in batch.sends.values())
            if got >= n_sends:
                break
            assert time.monotonic() < deadline, f"{got} of {n_sends} datagrams came"
            select.select(list(self._by_remote.values()), [], [], deadline - time.monotonic())
        if self.tun.fileno() >= 0:
            batch.writes = list(_drain(self.tun))
            if not self.has_vnet_hdr:
                batch.writes = [NO_VNET_HDR + write for write in batch.writes]
        batch.punts = [punt.packet for punt in self.rings.take_punts()]
        return batch

    def _taken_out(self, remote: Remote, payload: bytes, tos: int) -> bytes:
        """The packet in a datagram to a peer; fails unless the outer TOS is right, too."""
        packet = inner_packet(self.table, remote, payload)
        peer = next(peer for peer in self.table.peers if peer.remote == remote)
        assert tos == reference.outer_tos(peer, packet)
        return packet


# The numbers of linux/in.h; the socket module has no names for them.
_IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE = 10, 3
_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_SO_RCVBUFFORCE = 33

T = TypeVar("T")


def _goes_to_the_deaf(outcome: Outcome) -> bool:
    return any(str(address) == DEAF for (address, _port), _payload in outcome.sends)


def _on_the_wire(table: Table, messages: Sequence[Message]) -> Sequence[Message]:
    return messages if table.vtep is None else [message.over_vxlan(table.ethertype) for message in messages]


def inner_packet(table: Table, remote: Remote, payload: bytes) -> bytes:
    """The packet in a datagram to `remote`; fails unless every bit of the prefix is right."""
    if table.vtep is None:
        return payload
    packet = payload[reference.PREFIX_LEN :]
    peer = table.leasing(ip_address(destination_of(packet)))
    assert peer is not None
    assert peer.remote == remote
    assert payload == vxlan(packet, destination=peer.mac, source=OUR_MAC, ethertype=table.ethertype)
    return packet


def _messages(datagrams: Sequence[tuple[bytes, str]], ecn: int, *, is_in_trains: bool) -> list[Message]:
    messages = trains(datagrams) if is_in_trains else [Message(payload, source) for payload, source in datagrams]
    return [replace(message, ecn=ecn) for message in messages] if ecn else messages


def _another_overlay(table: Table, network: str, own_subnet: str, leases: Sequence[tuple[str, Peer]]) -> Table:
    own = IPv4Network(own_subnet)
    return replace(
        table,
        network=IPv4Network(network),
        own_subnet=own,
        tunnel_address=own.network_address,
        peers=tuple(replace(peer, subnet=IPv4Network(subnet)) for subnet, peer in leases),
    )


def of_packets(counters: dict[str, int]) -> dict[str, int]:
    """Without those of system calls, which only the fast path has."""
    return {name: n for name, n in counters.items() if not name.startswith(("tun_", "udp_"))}


def remote_of(datapath: Datapath, pod: str) -> Remote:
    """Of the peer in whose subnet the address is."""
    return next(peer.remote for peer in datapath.table.peers if ip_address(pod) in peer.subnet)


def assert_every_packet_is_counted(datapath: Datapath) -> None:
    """All that has come has one end each."""
    counters = datapath.counters
    for direction in ("encap", "decap"):
        names = [name for name in counters if name.startswith(direction) and not name.endswith("_packets")]
        assert counters[f"{direction}_packets"] == sum(counters[name] for name in names)


@contextmanager
def implementation(name: str, *, is_vxlan: bool = False, has_ipv6: bool = False) -> Iterator[Datapath]:
    """`reference`; `fastpath`, which is without UDP_GRO; or `trains`, which come wherever a batch allows them."""
    if name == "reference":
        yield ReferenceDatapath(is_vxlan=is_vxlan, has_ipv6=has_ipv6)
        return
    skip_unless_built()
    with_trains = name == "trains"
    with FastDatapath(has_gro=with_trains, is_in_trains=with_trains, is_vxlan=is_vxlan, has_ipv6=has_ipv6) as fast:
        yield fast


def skip_unless_built() -> None:
    """Skip the calling test while the fast path is not built; a fast path that cannot be loaded is an error."""
    pytest.importorskip("udptun._fastpath", reason="udptun._fastpath is not built", exc_type=ModuleNotFoundError)


def _drain(sock: socket.socket) -> Iterator[bytes]:
    while True:
        try:
            yield sock.recv(1 << 17)
        except BlockingIOError:
            return


def _chunks(items: Sequence[T], costs: Sequence[tuple[int, int]]) -> Iterator[Sequence[T]]:
    """`items` in parts that fit a socket's buffer and a full token bucket; `costs` are their packets and bytes."""
    start = packets = total = 0
    for i, (n, size) in enumerate(costs):
        # About 1,000 bytes of the buffer go to the kernel's own bookkeeping.
        cost = 2 * size + 1000
        if i > start and (total + cost > CHUNK_BYTES or packets + n > ICMP_BURST):
            yield items[start:i]
            start, packets, total = i, 0, 0
        packets += n
        total += cost
    if start < len(items):
        yield items[start:]


def _drain_udp(sock: socket.socket) -> Iterator[tuple[bytes, int]]:
    """Datagrams, each with the TOS of its outer packet."""
    while True:
        try:
            payload, ((_level, _kind, tos),), _flags, _source = sock.recvmsg(1 << 17, CONTROL_BYTES)
        except BlockingIOError:
            return
        yield payload, tos[0]


# ------------------------------------------------------------------------------------------ merged writes


def assert_same_packets(got: Sequence[bytes], expected: Sequence[bytes]) -> int:
    """Assert that the writes `got` are the packets of the writes `expected`; return how many of them are merged.

    Every flow must be complete and in order.  A flow is addresses, protocol and ports.  A packet that has no ports
    where they are looked for (fragment, options, extension headers, few bytes) belongs to all flows of its addresses.
    A packet of a merged write may have another id if it has DF, because the kernel numbers such packets anew.
    """
    alone = set(expected)
    packets: list[tuple[bytes, bool]] = []
    n_merged = 0
    for write in got:
        if write in alone:
            packets.append((write, False))
            continue
        assert_kernel_takes(write)
        packets += [(NO_VNET_HDR + packet, True) for packet in reference.segments(write)]
        n_merged += 1
    for flow in {_flow(write) for write in (*alone, *(packet for packet, _is_merged in packets))}:
        ours = [(packet, is_merged) for packet, is_merged in packets if _concerns(flow, packet)]
        theirs = [write for write in expected if _concerns(flow, write)]
        assert len(ours) == len(theirs)
        for (packet, is_merged), write in zip(ours, theirs, strict=True):
            if is_merged:
                assert _numbered_0(packet) == _numbered_0(write)
            else:
                assert packet == write
    return n_merged


def assert_kernel_takes(write: bytes) -> None:
    """Assert that a merged write is what virtio_net.h wants: measures, checksums and partial checksum."""
    packet = write[10:]
    is_ipv6 = packet[0] >> 4 == 6
    ip_header_len = 40 if is_ipv6 else 20
    header, transport = packet[:ip_header_len], packet[ip_header_len:]
    protocol = header[6 if is_ipv6 else 9]
    is_tcp = protocol == 6
    hdr_len = ip_header_len + ((transport[12] >> 4) * 4 if is_tcp else 8)
    gso_size = int.from_bytes(write[4:6], "little")
    gso_type = (GSO_TCPV6 if is_ipv6 else GSO_TCPV4) if is_tcp else GSO_UDP_L4
    at = 16 if is_tcp else 6
    assert write[:10] == vnet_hdr(
        flags=1, gso_type=gso_type, hdr_len=hdr_len, gso_size=gso_size, start=ip_header_len, offset=at
    )
    if is_ipv6:
        assert int.from_bytes(header[4:6]) == len(transport)
    else:
        assert header[0] == 0x45
        assert int.from_bytes(header[2:4]) == len(packet)
        assert internet_sum(header) == 0xFFFF
    assert gso_size < len(packet) - hdr_len <= 64 * gso_size
    assert len(packet) <= 0xFFFF
    pseudo = (header[8:] if is_ipv6 else header[12:]) + struct.pack(">IHH", len(transport), 0, protocol)
    assert int.from_bytes(transport[at : at + 2]) == internet_sum(pseudo)
    assert is_tcp or int.from_bytes(transport[4:6]) == len(transport)


Flow = tuple[bytes, bytes]
EXTENSION_HEADERS = (0, 43, 44, 51, 60)


def _flow(write: bytes) -> Flow:
    """Addresses, and protocol with ports; the second is empty where there are none."""
    packet = write[10:]
    if packet[0] >> 4 == 6:
        has_ports = packet[6] not in EXTENSION_HEADERS and len(packet) >= 44
        return packet[8:40], packet[6:7] + packet[40:44] if has_ports else b""
    has_ports = packet[0] == 0x45 and not int.from_bytes(packet[6:8]) & 0x3FFF and len(packet) >= 24
    return packet[12:20], packet[9:10] + packet[20:24] if has_ports else b""


def _concerns(flow: Flow, write: bytes) -> bool:
    addresses, ports = _flow(write)
    return addresses == flow[0] and ports in (flow[1], b"")


def _numbered_0(write: bytes) -> bytes:
    packet = write[10:]
    if packet[0] >> 4 == 6 or not packet[6] & 0x40:
        return write
    return write[:10] + with_header_checksum(packet[:4] + bytes(2) + packet[6:])

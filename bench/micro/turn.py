"""Nanoseconds per packet of the worker's turns: encap, segmentation, decap and merging, without a device.

The TUN is a socket pair that keeps packets apart, and the underlay is loopback: no root, no lab.  Only `Worker.turn` is
timed, with its system calls, not what puts packets in and takes them out.  So the figures show changes of the worker,
and say nothing about a real device.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Self

from bench.errors import BenchError
from bench.session import whole_number
from bench.summary import Spread, table
from udptun._fastpath import Worker
from udptun.core.tunnel import SourceCheck
from udptun.datapath.settings import PacketSettings, Remote
from udptun.datapath.stats import Stats
from udptun.datapath.table import TableWriter

_OURS, _PEER = IPv4Network("10.1.1.0/24"), IPv4Network("10.1.2.0/24")
_HERE, _THERE = "127.0.0.1", "127.0.0.2"
_MTU = 1472
_MSS = _MTU - 40
_SEGMENTS = 45
"""Of a super-packet: as many as fit 64 KiB."""

_ECT = 2
"""In the TOS of an inner packet: its sender understands marks of congestion (RFC 3168)."""

_PLAIN = bytes(10)
_SUPER = struct.pack("=BBHHHH", 1, 1, 40, _MSS, 20, 16)
"""virtio headers (linux/virtio_net.h): nothing special; NEEDS_CSUM and GSO_TCPV4."""

_PACKETS = 64 * _SEGMENTS
"""In one timed series; a segment counts as one."""


@dataclass(frozen=True, slots=True)
class Case:
    """`sends` go into the worker before it is turned, and come out as `n` packets, whole or in larger ones.

    `is_tos_told`: the worker's socket tells the outer TOS of each message, as it does for marks of congestion.
    """

    title: str
    is_encap: bool
    sends: tuple[bytes, ...]
    n: int
    is_tos_told: bool = True


def cases() -> list[Case]:
    """Both ways: datagrams one by one and in batches, and a TCP stream as the device and the peer deliver it."""
    found = []
    for is_encap, way, source, to in ((True, "encap", _OURS[2], _PEER[2]), (False, "decap", _PEER[2], _OURS[2])):
        header = _PLAIN if is_encap else b""
        for n in (1, 64):
            found += [
                Case(f"{way} UDP {size}, {n} at once", is_encap, (header + _udp(source, to, size),) * n, n)
                for size in (64, _MTU - 28)
            ]
        for tos in (0, _ECT):
            segments = tuple(header + _tcp(source, to, _MSS, i * _MSS, tos, is_whole=True) for i in range(_SEGMENTS))
            found.append(Case(f"{way} TCP{_named(tos)}, {_SEGMENTS} segments at once", is_encap, segments, _SEGMENTS))
    untold = [replace(case, title=f"{case.title}, no TOS told", is_tos_told=False) for case in found if case.n > 1]
    found += [case for case in untold if not case.is_encap]
    for tos in (0, _ECT):
        large = _SUPER + _tcp(_OURS[2], _PEER[2], _SEGMENTS * _MSS, 0, tos, is_whole=False)
        title = f"encap TCP{_named(tos)}, one super-packet of {_SEGMENTS} segments"
        found.append(Case(title, True, (large,), _SEGMENTS))
    return found


def _named(tos: int) -> str:
    return " with ECN" if tos else ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.micro.turn", description=__doc__)
    parser.add_argument(
        "--repeats", type=whole_number(1, 10_000), default=10, metavar="N", help="timed series (default: %(default)s)"
    )
    repeats = parser.parse_args(arguments).repeats
    rows = [
        [title, f"{of.median:.0f} ({of.low:.0f} to {of.high:.0f})" if of else "this build does not do that"]
        for title, of in measure(repeats).items()
    ]
    print(f"ns per packet, median (least to greatest) of {repeats} x {_PACKETS:,} packets")
    print("\n".join(table(["", "ns"], rows)))


def measure(repeats: int) -> Mapping[str, Spread | None]:
    """Time all cases in turn, `repeats` times: title -> ns per packet; None where nothing comes out."""
    figures: dict[str, list[float]] = {case.title: [] for case in cases()}
    with _Bench() as bench:
        able = [case for case in cases() if bench.does(case)]
        for _ in range(repeats):
            for case in able:
                took_ns = sum(bench.time_ns(case) for _ in range(_PACKETS // case.n))
                figures[case.title].append(took_ns / (_PACKETS // case.n * case.n))
    return {title: Spread.of(values) if values else None for title, values in figures.items()}


class _Bench:
    """A worker that is turned by hand, between a socket pair and loopback."""

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._tun, worker_tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            for end in (self._tun, worker_tun):
                undo.enter_context(end)
                end.setblocking(False)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            udp, self._peer = undo.enter_context(_bound(_HERE)), undo.enter_context(_bound(_THERE))
            self._udp, self._udp_address = udp, udp.getsockname()
            writer, self._stats = TableWriter.create(), Stats.create()
            undo.callback(writer.close)
            undo.callback(self._stats.close)
            settings = PacketSettings(IPv4Network("10.1.0.0/16"), _OURS, IPv4Address(_HERE), _MTU, SourceCheck.PEER)
            writer.configure(settings)
            remote = Remote(IPv4Address(_THERE), self._peer.getsockname()[1], is_udptun=True, carries_ecn=True)
            writer.set_peer(_PEER, remote, _MTU)
            if not writer.publish(self._stats):
                raise BenchError("a new table could not be published")
            self._worker = Worker(writer.fd, self._stats.fd, 0, worker_tun.fileno(), udp.fileno())
            # One CPU for sender, loopback and receiver.
            cpus = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {min(cpus)})
            undo.callback(os.sched_setaffinity, 0, cpus)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        del self._worker
        self._undo.close()

    def does(self, case: Case) -> bool:
        """Whether anything of the case comes out.  Also a warm-up."""
        self._put(case)
        while self._worker.turn():
            pass
        came = bool(self._take(case))
        with contextlib.suppress(BlockingIOError):
            # An ICMP answer on the other side, where the case is refused.
            while self._tun.recv(1 << 17):
                pass
        return came

    def time_ns(self, case: Case) -> int:
        """Nanoseconds of all turns that moved something.  Raises BenchError when a byte is missing at the end."""
        self._put(case)
        took_ns, is_moving = 0, True
        while is_moving:
            start = time.perf_counter_ns()
            is_moving = self._worker.turn()
            # The turn that finds nothing is not part of the work.
            took_ns += (time.perf_counter_ns() - start) * is_moving
        came, wanted = self._take(case), case.n * _payload_of(case)
        if came != wanted:
            raise BenchError(f"{case.title}: {came} bytes of payload came out, not {wanted}")
        return took_ns

    def _put(self, case: Case) -> None:
        self._udp.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, case.is_tos_told)
        for packet in case.sends:
            if case.is_encap:
                self._tun.send(packet)
            else:
                # As a peer does in normal mode.
                self._peer.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, packet[1])
                self._peer.sendto(packet, self._udp_address)

    def _take(self, case: Case) -> int:
        """Payload bytes that came out: what was merged on the way has one header for several packets."""
        n_bytes = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = self._peer.recv(1 << 16) if case.is_encap else self._tun.recv(1 << 17)[len(_PLAIN) :]
                n_bytes += len(packet) - (40 if packet[9] == socket.IPPROTO_TCP else 28)
        return n_bytes


def _payload_of(case: Case) -> int:
    """Bytes in each of the case's packets."""
    packet = case.sends[0][len(_PLAIN) :] if case.is_encap else case.sends[0]
    if packet[9] == socket.IPPROTO_TCP:
        return _MSS
    return len(packet) - 28


def _udp(source: IPv4Address, to: IPv4Address, n_bytes: int) -> bytes:
    """A datagram with `n_bytes` of payload."""
    header = struct.pack("!HHHH", 9, 9, 8 + n_bytes, 0)
    return _ipv4(source, to, socket.IPPROTO_UDP, header + bytes(n_bytes), tos=0, checksum_at=6, is_whole=True)


def _tcp(source: IPv4Address, to: IPv4Address, n_bytes: int, seq: int, tos: int, *, is_whole: bool) -> bytes:
    """A segment of an established connection; not `is_whole`: with the pseudo-header's sum for a checksum."""
    header = struct.pack("!HHIIBBHHH", 9, 9, seq, 1, 5 << 4, 0x10, 1000, 0, 0)
    return _ipv4(source, to, socket.IPPROTO_TCP, header + bytes(n_bytes), tos, checksum_at=16, is_whole=is_whole)


def _ipv4(
    source: IPv4Address, to: IPv4Address, protocol: int, content: bytes, tos: int, *, checksum_at: int, is_whole: bool
) -> bytes:
    pseudo = source.packed + to.packed + struct.pack("!HH", protocol, len(content))
    total = _sum(pseudo + content) ^ 0xFFFF if is_whole else _sum(pseudo)
    content = content[:checksum_at] + struct.pack("!H", total) + content[checksum_at + 2 :]
    head = struct.pack("!BBHHHBB", 0x45, tos, 20 + len(content), 1, 0x4000, 64, protocol)
    addresses = source.packed + to.packed
    return head + struct.pack("!H", _sum(head + addresses) ^ 0xFFFF) + addresses + content


def _sum(data: bytes) -> int:
    """RFC 1071, by arithmetic modulo 65,535 instead of carries."""
    return int.from_bytes(data + b"\0" * (len(data) % 2)) % 0xFFFF


def _bound(address: str) -> socket.socket:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((address, 0))
    udp.setblocking(False)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    return udp


if __name__ == "__main__":
    main()

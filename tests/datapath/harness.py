"""One interface over both implementations of docs/wire-format.md.

The fast path gets real UDP sockets on loopback and, for the TUN, one end of a socket pair that keeps packets apart:

    test --feed--> [socketpair = TUN] --> Worker --> UDP 127.0.0.1 --> 127.0.0.2 to .5: the peers, sockets of the test
    test <-drain-- [socketpair = TUN] <-- Worker <-- UDP 127.0.0.1 <-- the peers' sockets, or any other 127/8 address
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import pytest

from tests.packets import DEAF, NARROW, NEAR, TWIN, WIDE, overlay
from udptun import _reference as reference
from udptun._reference import Outcome, Peer, Remote, Table

if TYPE_CHECKING:
    from udptun.datapath.stats import Stats
    from udptun.datapath.table import TableWriter

DEADLINE_S = 5.0
"""Loopback delivers in microseconds; this is for a machine that is busy with something else."""

ICMP_BURST = 50
"""Answers a new worker may give at once (docs/wire-format.md)."""

CHUNK_BYTES = 100_000
"""What is put into a socket before the worker runs: less than the default buffers hold."""


@dataclass
class Batch:
    """What became of several packets: counters that moved, and what came out, in order."""

    counts: dict[str, int] = field(default_factory=dict)
    sends: dict[Remote, list[bytes]] = field(default_factory=dict)
    writes: list[bytes] = field(default_factory=list)

    def add(self, other: Batch) -> None:
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        for remote, payloads in other.sends.items():
            self.sends.setdefault(remote, []).extend(payloads)
        self.writes += other.writes

    def outcome(self) -> Outcome:
        """As one packet's.  Fails unless exactly one packet was counted, once."""
        beside = [name for name in self.counts if name.startswith("icmp_")]
        ends = [name for name in self.counts if not name.startswith("icmp_") and not name.endswith("_packets")]
        assert len(ends) == 1
        assert len(beside) <= 1
        assert set(self.counts.values()) == {1}
        sends = tuple((remote, payload) for remote, payloads in self.sends.items() for payload in payloads)
        return Outcome(ends[0], sends, tuple(self.writes), beside[0] if beside else None)  # type: ignore[arg-type]


class Datapath(Protocol):
    """What a test can do to either implementation."""

    table: Table

    def configure(self, **changes: object) -> None:
        """Replace fields of `table`, but for the peers, and publish it."""

    def set_overlay(self, network: str, own_subnet: str, leases: Sequence[tuple[str, Peer]]) -> None:
        """Publish another overlay: `leases` are subnets, each with the peer of the old table that holds it now."""

    def encap_batch(self, raws: Sequence[bytes]) -> Batch: ...

    def decap_batch(self, datagrams: Sequence[tuple[bytes, str]]) -> Batch:
        """Payloads and the outer addresses they come from."""

    def encap(self, raw: bytes) -> Outcome: ...

    def decap(self, payload: bytes, source: str) -> Outcome: ...

    def break_tun(self) -> None:
        """From now on the TUN refuses every write."""

    @property
    def counters(self) -> dict[str, int]: ...


class ReferenceDatapath:
    """`udptun._reference` behind the interface."""

    def __init__(self) -> None:
        self.table = overlay()
        self.counters = dict.fromkeys(reference.COUNTERS, 0)
        self._is_tun_broken = False

    def configure(self, **changes: object) -> None:
        self.table = replace(self.table, **changes)  # type: ignore[arg-type]

    def set_overlay(self, network: str, own_subnet: str, leases: Sequence[tuple[str, Peer]]) -> None:
        self.table = _another_overlay(self.table, network, own_subnet, leases)

    def encap_batch(self, raws: Sequence[bytes]) -> Batch:
        total = Batch()
        for raw in raws:
            self._count(total, "encap_packets", self._encap(raw))
        return total

    def decap_batch(self, datagrams: Sequence[tuple[bytes, str]]) -> Batch:
        total = Batch()
        for payload, source in datagrams:
            self._count(total, "decap_packets", self._decap(payload, IPv4Address(source)))
        return total

    def encap(self, raw: bytes) -> Outcome:
        return self.encap_batch([raw]).outcome()

    def decap(self, payload: bytes, source: str) -> Outcome:
        return self.decap_batch([(payload, source)]).outcome()

    def break_tun(self) -> None:
        self._is_tun_broken = True

    def _encap(self, raw: bytes) -> Outcome:
        outcome = reference.encap(self.table, raw)
        return reference.encap(self.table, raw, is_refused=True) if _goes_to_the_deaf(outcome) else outcome

    def _decap(self, payload: bytes, source: IPv4Address) -> Outcome:
        outcome = reference.decap(self.table, payload, source, is_refused=self._is_tun_broken)
        return reference.decap(self.table, payload, source, is_refused=True) if _goes_to_the_deaf(outcome) else outcome

    def _count(self, total: Batch, packets: str, outcome: Outcome) -> None:
        one = Batch({packets: 1, outcome.counter: 1}, writes=list(outcome.writes))
        if outcome.icmp:
            one.counts[outcome.icmp] = 1
        for remote, payload in outcome.sends:
            one.sends.setdefault(remote, []).append(payload)
        for name, count in one.counts.items():
            self.counters[name] += count
        total.add(one)


class FastDatapath:
    """`udptun._fastpath` behind the interface: one worker, turned by hand, with sockets all around it.

    A context manager.  Every 50 ICMP answers it goes on with a new worker, whose token bucket is full, unless
    `is_bucket_renewed` is false.
    """

    def __init__(self, *, is_bucket_renewed: bool = True) -> None:
        from udptun import _fastpath
        from udptun.datapath.stats import Stats
        from udptun.datapath.table import TableWriter

        self._new_worker = _fastpath.Worker
        self._is_bucket_renewed = is_bucket_renewed
        with ExitStack() as self._undo:
            self._set_up(TableWriter.create(), Stats.create())
            self._undo = self._undo.pop_all()

    def _set_up(self, writer: TableWriter, stats: Stats) -> None:
        self._writer, self._stats = writer, stats
        self._undo.callback(writer.close)
        self._undo.callback(stats.close)
        # One CPU for sender, loopback and receiver: its backlog keeps the order across sockets.
        cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cpus)})
        self._undo.callback(os.sched_setaffinity, 0, cpus)

        self.tun, self._worker_tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (self.tun, self._worker_tun):
            self._undo.enter_context(end)
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.udp = self._bound("127.0.0.1")
        # The kernel answers EMSGSIZE only to a socket that never lets it fragment.
        self.udp.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
        self._outer = {ip: self._bound(ip) for ip in (NEAR, NARROW, TWIN, WIDE)}
        self._by_remote: dict[Remote, socket.socket] = {}
        ports = {}
        for ip, sock in self._outer.items():
            ports[ip] = sock.getsockname()[1]
            self._by_remote[IPv4Address(ip), ports[ip]] = sock
        self.table = overlay(ports)

        self._publish()
        self._renew_worker()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                left = self._collect(n_sends=0)
                assert (left.sends, left.writes) == ({}, []), "something came out that no counter announced"
        finally:
            del self._worker
            self._undo.close()

    @property
    def counters(self) -> dict[str, int]:
        return self._stats.counters()

    def configure(self, **changes: object) -> None:
        self.table = replace(self.table, **changes)  # type: ignore[arg-type]
        self._publish()

    def set_overlay(self, network: str, own_subnet: str, leases: Sequence[tuple[str, Peer]]) -> None:
        for peer in self.table.peers:
            self._writer.remove_peer(peer.subnet)
        assert self._writer.publish(self._stats)
        self.table = _another_overlay(self.table, network, own_subnet, leases)
        self._publish()

    def encap_batch(self, raws: Sequence[bytes]) -> Batch:
        total = Batch()
        for chunk in _chunks(raws, sizes=[len(raw) for raw in raws]):
            before = self._begin(len(chunk))
            for raw in chunk:
                self.tun.send(raw)
            total.add(self._finish(before, "encap_packets", len(chunk)))
        return total

    def decap_batch(self, datagrams: Sequence[tuple[bytes, str]]) -> Batch:
        total = Batch()
        for chunk in _chunks(datagrams, sizes=[len(payload) for payload, _source in datagrams]):
            before = self._begin(len(chunk))
            for payload, source in chunk:
                if source not in self._outer:
                    self._outer[source] = self._bound(source)
                self._outer[source].sendto(payload, self.udp.getsockname())
            total.add(self._finish(before, "decap_packets", len(chunk)))
        return total

    def encap(self, raw: bytes) -> Outcome:
        return self.encap_batch([raw]).outcome()

    def decap(self, payload: bytes, source: str) -> Outcome:
        return self.decap_batch([(payload, source)]).outcome()

    def break_tun(self) -> None:
        self.tun.close()

    def _bound(self, ip: str) -> socket.socket:
        sock = self._undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind((ip, 0))
        sock.setblocking(False)
        return sock

    def _publish(self) -> None:
        from udptun.config import SourceCheck
        from udptun.datapath import table as shared

        table = self.table
        self._writer.configure(
            shared.Settings(
                network=table.network,
                own_subnet=table.own_subnet,
                underlay_address=table.underlay_address,
                mtu=table.mtu,
                source_check=SourceCheck(table.source_check),
            )
        )
        for peer in table.peers:
            remote = shared.Remote(*peer.remote, is_udptun=False)
            self._writer.set_peer(peer.subnet, remote, peer.mtu)
        assert self._writer.publish(self._stats), "no worker runs, so none can hold the other slot"

    def _renew_worker(self) -> None:
        self._worker = self._new_worker(
            self._writer.fd, self._stats.fd, 0, self._worker_tun.fileno(), self.udp.fileno()
        )
        self._n_answers = 0

    def _begin(self, n_packets: int) -> dict[str, int]:
        """Make sure that the bucket holds an answer for each packet; return the counters."""
        if self._is_bucket_renewed and self._n_answers + n_packets > ICMP_BURST:
            self._renew_worker()
        return self.counters

    def _finish(self, before: dict[str, int], packets: str, n: int) -> Batch:
        """Run the worker until it has counted `n` more under `packets`, and collect what came out."""
        deadline = time.monotonic() + DEADLINE_S
        while (after := self.counters)[packets] < before[packets] + n:
            if not self._worker.turn():
                assert time.monotonic() < deadline, f"{packets} grew by {after[packets] - before[packets]} of {n}"
        counts = {name: after[name] - before[name] for name in after if after[name] != before[name]}
        answers = counts.get("icmp_sent", 0)
        self._n_answers += answers
        batch = self._collect(counts.get("encap_sent", 0) + (answers if packets == "decap_packets" else 0))
        batch.counts = counts
        return batch

    def _collect(self, n_sends: int) -> Batch:
        """Everything that waits on this side, once `n_sends` datagrams have come."""
        batch = Batch()
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for remote, sock in self._by_remote.items():
                if payloads := list(_drain(sock)):
                    batch.sends.setdefault(remote, []).extend(payloads)
            got = sum(len(payloads) for payloads in batch.sends.values())
            if got >= n_sends:
                break
            assert time.monotonic() < deadline, f"{got} of {n_sends} datagrams came"
            select.select(list(self._by_remote.values()), [], [], deadline - time.monotonic())
        if self.tun.fileno() >= 0:
            batch.writes = list(_drain(self.tun))
        return batch


# The numbers of linux/in.h; the socket module has no names for them.
_IP_MTU_DISCOVER, _IP_PMTUDISC_DO = 10, 2

T = TypeVar("T")


def _goes_to_the_deaf(outcome: Outcome) -> bool:
    return any(str(address) == DEAF for (address, _port), _payload in outcome.sends)


def _another_overlay(
    table: Table, network: str, own_subnet: str, leases: Sequence[tuple[str, Peer]]
) -> Table:
    own = IPv4Network(own_subnet)
    return replace(
        table,
        network=IPv4Network(network),
        own_subnet=own,
        tunnel_address=own.network_address,
        peers=tuple(replace(peer, subnet=IPv4Network(subnet)) for subnet, peer in leases),
    )


def skip_unless_built() -> None:
    """Skip the test that calls it while the fast path is missing; one that cannot be loaded is an error."""
    pytest.importorskip("udptun._fastpath", reason="udptun._fastpath is not built", exc_type=ModuleNotFoundError)


def _drain(sock: socket.socket) -> Iterator[bytes]:
    while True:
        try:
            yield sock.recv(1 << 17)
        except BlockingIOError:
            return


def _chunks(items: Sequence[T], sizes: Sequence[int]) -> Iterator[Sequence[T]]:
    """`items` in parts that fit a socket's buffer and a full token bucket."""
    start = total = 0
    for i, size in enumerate(sizes):
        # About 1,000 bytes of the buffer go to the kernel's own bookkeeping.
        cost = 2 * size + 1000
        if i > start and (total + cost > CHUNK_BYTES or i - start == ICMP_BURST):
            yield items[start:i]
            start, total = i, 0
        total += cost
    if start < len(items):
        yield items[start:]

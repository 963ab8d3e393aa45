"""What the datapath would do with a packet, asked of the code that moves packets, without moving any."""

from __future__ import annotations

from dataclasses import dataclass

from udptun import _fastpath
from udptun.core.network_state import IPAddress
from udptun.datapath.slot import PublishedPeer, socket_address_bytes
from udptun.datapath.stats import Stats
from udptun.datapath.table import TableWriter


@dataclass(frozen=True, slots=True)
class Verdict:
    """`counter`: where the packet would end.  `peer`: who gets it, or leases its source; None: nobody does."""

    counter: str
    peer: PublishedPeer | None


class Judge:
    """Asks by the table that is published now; for the thread that publishes.

    What only the kernel knows is not looked at: whatever passes all checks is sent or delivered.
    """

    def __init__(self, table: TableWriter, stats: Stats) -> None:
        self._table = table
        self._judge = _fastpath.Judge(table.fd, stats.fd)

    def encap(self, packet: bytes) -> Verdict:
        """Of an IP packet that the TUN gives."""
        return self._verdict(*self._judge.encap(packet))

    def decap(self, packet: bytes, source: IPAddress, port: int) -> Verdict:
        """Of an IP packet in a datagram from there, with VXLAN behind a right prefix."""
        return self._verdict(*self._judge.decap(packet, socket_address_bytes(source, port)))

    def _verdict(self, counter: str, index: int) -> Verdict:
        return Verdict(counter, self._table.published.peer(index) if index else None)

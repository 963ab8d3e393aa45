"""Peers whose packets come from another address than their PublicIP, in words for the operator.

The workers drop such packets and remember where they came from (fastpath/stray.pxd).  Where PublicIP is translated on
the way in and not on the way out, nothing else says why a peer is silent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator

from udptun.core.network_state import IPAddress, IPNetwork
from udptun.datapath.stats import Stats, Stray
from udptun.datapath.table import TableWriter

log = logging.getLogger(__name__)

_FRESH_S = 30.0
"""A line stays for so long after the last datagram."""
_MAX_LINES = 4
"""Whoever spoofs sources must not fill the status with lines."""
_LOOK_S, _LOG_S = 5.0, 60.0
"""Seconds.  The log is for addresses that are seen in two looks, and gets a line no more often than this."""


class StrayWatch:
    """What is wrong is read from the shared memory when somebody asks; `run` tells the log."""

    def __init__(
        self,
        table: TableWriter,
        stats: Stats,
        n_workers: Callable[[], int],
        is_explained: Callable[[IPNetwork, IPAddress, float], bool],
    ) -> None:
        """`is_explained` says of a subnet, an outer address and a time whether datagrams until then need no line."""
        self._table = table
        self._stats = stats
        self._n_workers = n_workers
        self._is_explained = is_explained

    @property
    def problems(self) -> tuple[str, ...]:
        """A line for each address.  May be read on another thread."""
        lines = list(self._lines().values())
        more = len(lines) - _MAX_LINES
        if more > 0:
            lines[_MAX_LINES:] = [
                f"{more} more addresses send packets of other hosts' subnets, dropped likewise"
            ]
        return tuple(lines)

    async def run(self) -> None:
        """Log each address that packets keep coming from, once, and the end of it all; until cancelled."""
        clock = asyncio.get_running_loop().time
        logged: set[tuple[IPAddress, IPNetwork]] = set()
        before: set[tuple[IPAddress, IPNetwork]] = set()
        quiet_until_s = 0.0
        while True:
            lines = self._lines()
            for pair in [it for it in lines if it in before and it not in logged]:
                if clock() < quiet_until_s:
                    break
                log.warning("%s", lines[pair])
                quiet_until_s = clock() + _LOG_S
                logged.add(pair)
            if logged and not lines:
                log.info("no packets any more from addresses that no lease explains")
                logged.clear()
            before = set(lines)
            await asyncio.sleep(_LOOK_S)

    @property
    def packets(self) -> dict[IPNetwork, int]:
        """How many packets of a subnet came from elsewhere, by subnet; as `problems`."""
        found: dict[IPNetwork, int] = {}
        for stray, subnet, _ in self._found():
            found[subnet] = found.get(subnet, 0) + stray.datagrams
        return found

    def _lines(self) -> dict[tuple[IPAddress, IPNetwork], str]:
        """By outer address and subnet."""
        return {
            (stray.outer, subnet): self._line(stray.outer, stray.datagrams, subnet, public_ip)
            for stray, subnet, public_ip in self._found()
        }

    def _found(self) -> Iterator[tuple[Stray, IPNetwork, IPAddress]]:
        """Each with the subnet that its inner source lies in, and the PublicIP of who leases that.

        What a lease, or what was learned, explains by now is left out.
        """
        if not self._table.checks_sources:
            return
        for stray in self._stats.strays(self._n_workers(), time.monotonic() - _FRESH_S):
            lease = self._table.peer_of(stray.inner)
            if lease is None or lease[1] == stray.outer:
                continue
            if not self._is_explained(lease[0], stray.outer, stray.last_s):
                yield stray, *lease

    def _line(self, outer: IPAddress, datagrams: int, subnet: IPNetwork, public_ip: IPAddress) -> str:
        flag = "--public-ip" if outer.version == 4 else "--public-ipv6"
        whose = "the PublicIP of another host" if self._table.has_remote(outer) else "no host's PublicIP"
        return (
            f"{datagrams} packets of {subnet} came from {outer}, {whose}, and were dropped, because the host of "
            f"{subnet} has the PublicIP {public_ip}; if {outer} is that host, start its daemon with "
            f"{flag}={outer}, or have the NAT on the way translate the source of what it sends to {public_ip}; "
            "with SourceCheck off packets may come from anywhere"
        )

"""The kernel keeps the datagrams of strangers from the workers, while many of them arrive.

    stranger    an outer source that is no peer's PublicIP, nor learned of a peer; SourceCheck refuses it
    sink        a socket on the workers' port that drops all it gets, and counts it
    set         the workers' sockets of one outer family; each has a program and a sink of its own

A program on the port sends strangers to the sink (stranger_program.py).  The control plane alone holds the sink, so it
goes with the control plane, however that ends.  The program is then left with a number that no socket has, and the
kernel gives a worker what was for the sink.  So the next control plane, of whatever version, finds a port that takes in
everything.

Each datagram of a stranger counts as long as they are few: a host behind a NAT is named at its first packet.  During a
flood the workers get some of it, as few a second as cost next to nothing.

The sum of what all sinks have dropped is in the statistics' memory file, as the counters of the workers.  A control
plane that is killed takes along what its sink has dropped since the last look.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

from udptun.core.network_state import IPAddress
from udptun.datapath.sockets import choose_socket, family_of, n_drops, open_sink, share_port, spread_over
from udptun.datapath.stats import Stats
from udptun.datapath.stranger_program import MAX_ADDRESSES, packed, source_keys, stranger_program
from udptun.datapath.table import TableWriter

log = logging.getLogger(__name__)

FLOOD_PER_S = 1000
"""Datagrams that are dropped.  So many cost a worker some 1 % of a processor."""
_ONE_IN = 256
"""One stranger's datagram in so many reaches a worker while it is not known yet how large the flood is."""
_LET_THROUGH_PER_S = 100
"""About so many should.  Each may wake a worker."""
_LEAST_ONE_IN = 8
"""What fits a flood that is only just one."""
_LOOK_S, _CALM_S = 1.0, 10.0
"""Seconds between two looks, and without a flood until the filter is taken away."""


class StrangerFilter:
    """Begins with a flood and ends after it.  For one event loop; `state` may be read on any thread."""

    def __init__(
        self, table: TableWriter, stats: Stats, sets: Callable[[], Sequence[Sequence[socket.socket]]]
    ) -> None:
        self._table = table
        self._stats = stats
        self._sets = sets
        self._is_allowed = False
        self._is_paused = False
        self._sinks: list[_Sink] = []
        self._multiplier = 1
        self._one_in = _ONE_IN
        self._sources: Set[IPAddress] | None = None
        """What the programs know."""
        self._refusal = self._logged = ""
        self._n_before, self._looked_s, self._flood_s = self._n_refused_by_workers(), time.monotonic(), 0.0

    @property
    def state(self) -> str:
        """For `udptun status`: `on`, `ready`, `off`, or why there is none."""
        if not self._is_allowed or not self._table.checks_sources:
            return "off"
        n_peers = self._table.n_remotes
        if n_peers + self._table.n_learned > MAX_ADDRESSES:
            beside = "" if n_peers > MAX_ADDRESSES else " and addresses that were learned"
            return f"off: more than {MAX_ADDRESSES} peers{beside}"
        return self._refusal or ("on" if self._sinks else "ready")

    def allow(self, is_allowed: bool) -> None:
        """Whether there may be a filter at all."""
        self._is_allowed = is_allowed
        self._refusal = ""

    async def run(self) -> None:
        """Begin and end as strangers come and go, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            self.look()

    def look(self) -> None:
        """Count what was dropped since the last look, and begin or end if that says so."""
        now_s, by_sink = time.monotonic(), self._count()
        n = self._n_refused_by_workers()
        elapsed_s = now_s - self._looked_s
        limit = FLOOD_PER_S * elapsed_s
        by_workers = n - self._n_before
        is_flood = by_workers + by_sink > limit
        self._n_before, self._looked_s = n, now_s
        if is_flood:
            self._flood_s = now_s
            if self._sinks:
                one_in = _fitting(self._one_in, by_sink / elapsed_s) if by_sink else self._one_in
                # Or a datapath process that took over from another has set its own program.
                if one_in != self._one_in or by_workers > limit:
                    self._one_in, self._sources = one_in, None
                    self.follow()
            elif not self._is_paused and self.state == "ready":
                self._begin()
        elif now_s - self._flood_s > _CALM_S:
            self.end()

    def follow(self) -> None:
        """Let in the peers of the table that is about to be published; call this first, so that none is lost."""
        if not self._sinks:
            self._refusal = ""
        elif self.state != "on":
            self.end()
        elif (sources := self._table.next_sources(MAX_ADDRESSES)) != self._sources:
            try:
                self._attach(sources)
            except OSError as exc:
                self._refuse(exc)

    def end(self) -> None:
        """Let everything in."""
        if not self._sinks:
            return
        self._take_away()
        log.info("strangers reach the workers again dropped=%d", self._stats.n_strangers)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No filter meanwhile, for a change of the sockets: those that join have to stand where the sink does."""
        self.end()
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            self._refusal = ""

    def _begin(self) -> None:
        self._one_in = _ONE_IN
        self._multiplier = random.SystemRandom().getrandbits(32) | 1
        try:
            for sockets in self._sets():
                share_port(sockets, among_several=True)
            # A program before there is a sink: the kernel's own choice may be the sink.
            self._attach(self._table.next_sources(MAX_ADDRESSES))
            for sockets in self._sets():
                self._sinks.append(_Sink(open_sink(sockets[0])))
        except OSError as exc:
            self._refuse(exc)
            return
        log.info("strangers are kept from the workers, because more than %d packets/s are dropped", FLOOD_PER_S)

    def _attach(self, sources: Set[IPAddress]) -> None:
        for sockets in self._sets():
            family = family_of(sockets[0])
            addresses = (int(it) for it in sources if it.version == family.value)
            keys = source_keys(addresses, family, self._multiplier)
            program = stranger_program(keys, len(sockets), self._one_in, family, self._multiplier)
            choose_socket(sockets[0], packed(program))
        self._sources = sources

    def _refuse(self, exc: OSError) -> None:
        """Do without, until peers or sockets change."""
        self._refusal = f"off: the kernel refuses it: {errno.errorcode.get(exc.errno or 0, exc.errno)}"
        if self._sinks:
            self.end()
        else:
            # Another family may have got its program before.
            self._take_away()
        if self._refusal != self._logged:
            log.warning("cannot keep a flood of strangers from the workers, who drop it themselves: %s", exc)
            self._logged = self._refusal

    def _take_away(self) -> None:
        """Have the kernel spread everything over the workers again; without programs, as far as there are any."""
        for sockets in self._sets():
            # First, so that nothing is left to the kernel's own choice, which may be the sink.
            spread_over(sockets)
        self._count()
        for sink in self._sinks:
            sink.udp.close()
        self._sinks.clear()
        for sockets in self._sets():
            share_port(sockets, among_several=len(sockets) > 1)

    def _count(self) -> int:
        """Add to the sum what the sinks have dropped since the last time, and return it."""
        n = sum(sink.count() for sink in self._sinks)
        self._stats.n_strangers += n
        return n

    def _n_refused_by_workers(self) -> int:
        return sum(n for name, n in self._stats.counters().items() if name.startswith("decap_drop_"))


@dataclass(slots=True)
class _Sink:
    """The sink of one set.  `n_counted`: its drops that are in the sum."""

    udp: socket.socket
    n_counted: int = 0

    def count(self) -> int:
        """How much it has dropped since the last time."""
        before, self.n_counted = self.n_counted, n_drops(self.udp)
        # The kernel counts in 32 bits.
        return (self.n_counted - before) & 0xFFFFFFFF


def _fitting(one_in: int, per_s: float) -> int:
    """A power of two: of `per_s` datagrams one in so many is some _LET_THROUGH_PER_S.  `one_in`, if that is near it."""
    wanted = max(_LEAST_ONE_IN, per_s / _LET_THROUGH_PER_S)
    return one_in if wanted / 2 <= one_in <= wanted * 2 else 1 << int(wanted).bit_length()

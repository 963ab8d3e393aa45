"""The answer to `GET /trace/live?…`, docs/trace.md: packets and their ends, a line of JSON for each as it comes.

The workers show packets for as long as somebody asks them to, a few seconds at a time.  So the trace ends with the
client, whose end the server sees, and with the daemon.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from udptun.control.http import Request, Response
from udptun.control.running import Running
from udptun.core.counter_words import COUNTERS, PAGE
from udptun.core.errors import UsageError
from udptun.core.family import Family
from udptun.core.live_trace import LiveTraceRequest
from udptun.core.packet_head import PacketHead

if TYPE_CHECKING:
    from udptun.control.tunnelled import Tunnelled
    from udptun.datapath.tracing import Traced

SCHEMA = 1
"""Of the lines.  Keys are only ever added."""
_LOOK_S = 0.02
_VALID_S = 3.0
"""The workers show packets no longer than this after the last look: a daemon that was killed looks no more."""


class LiveTraces:
    """One at a time: what the workers show is for one reader."""

    def __init__(self) -> None:
        self._packets: LivePackets | None = None

    def answer(self, running: Running, request: Request, is_current: Callable[[], bool]) -> Response:
        """`is_current`: whether the daemon still runs with what it has now."""
        try:
            asked = LiveTraceRequest.from_query(request.query)
        except UsageError as exc:
            return Response(HTTPStatus.BAD_REQUEST, f"{exc}\n")
        tunnels = _tunnels(running, asked)
        if not tunnels:
            return Response(HTTPStatus.CONFLICT, f"{_kernels(running, asked)}\n")
        if self._packets is not None:
            words = f"another live trace runs, for {self._packets.left_s:.0f} s at most: there can be one at a time"
            return Response(HTTPStatus.CONFLICT, f"{words}\n")
        self._packets = LivePackets(tunnels, asked, is_current, self._end)
        return Response(HTTPStatus.OK, self._packets.begin, "application/x-ndjson", self._packets)

    def _end(self) -> None:
        self._packets = None


class LivePackets:
    """The lines of one trace."""

    def __init__(
        self,
        tunnels: Sequence[Tunnelled],
        asked: LiveTraceRequest,
        is_current: Callable[[], bool],
        ended: Callable[[], None],
    ) -> None:
        """Begins at once; `ended` is called when it is over."""
        self._tunnels, self._asked, self._is_current, self._ended = tunnels, asked, is_current, ended
        self._n_packets = 0
        self._has_ended = False
        self._due_s = time.monotonic() + asked.seconds
        for it in tunnels:
            it.tunnel.tracer.start(asked, _VALID_S)

    @property
    def left_s(self) -> float:
        return max(0.0, self._due_s - time.monotonic())

    @property
    def begin(self) -> str:
        """The first line."""
        devices = [it.device for it in self._tunnels]
        has_shortcut = any(it.shortcut.is_on for it in self._tunnels)
        head = {"schema": SCHEMA, "event": "begin", "devices": devices, "seconds": self._asked.seconds}
        return _line({**head, "shortcut": has_shortcut})

    async def __anext__(self) -> str:
        """The lines of the packets that have come, or the last line."""
        if self._has_ended:
            raise StopAsyncIteration
        while True:
            is_over = self.left_s <= 0
            lines = self._take()
            if self._n_packets >= self._asked.n_packets:
                return self._end(lines, "packets")
            if is_over:
                return self._end(lines, "seconds")
            if not self._is_current():
                return self._end(lines, "daemon")
            for it in self._tunnels:
                it.tunnel.tracer.extend(_VALID_S)
            # Not only when nothing has come: what comes meanwhile goes with it.
            await asyncio.sleep(_LOOK_S)
            if lines:
                return lines

    def close(self) -> None:
        for it in self._tunnels:
            it.tunnel.tracer.stop()
        self._ended()

    def _take(self) -> str:
        found = [(traced, it) for it in self._tunnels for traced in it.tunnel.tracer.take()]
        found = sorted(found, key=lambda pair: pair[0].time_ns)[: self._asked.n_packets - self._n_packets]
        self._n_packets += len(found)
        # The workers' clock begins with the boot of the host.
        offset_ns = time.time_ns() - time.monotonic_ns()
        return "".join(_line(_document(traced, it, offset_ns)) for traced, it in found)

    def _end(self, lines: str, reason: str) -> str:
        self._has_ended = True
        n_lost = sum(it.tunnel.tracer.n_lost for it in self._tunnels)
        return lines + _line({"event": "end", "reason": reason, "packets": self._n_packets, "lost": n_lost})


def _tunnels(running: Running, asked: LiveTraceRequest) -> Sequence[Tunnelled]:
    """Those that may carry what is asked for."""
    forwarding = running.forwarding
    if asked.version is None:
        return list(forwarding.tunnels)
    family = Family(asked.version)
    carried = forwarding.tunnel_of(family)
    return [] if carried is None else [carried]


def _kernels(running: Running, asked: LiveTraceRequest) -> str:
    forwarding = running.forwarding
    families: Iterable[Family] = forwarding.families if asked.version is None else (Family(asked.version),)
    devices = {forwarding.device(it) for it in families if it in forwarding.families} - {None}
    device = min(map(str, devices), default=running.underlay.link_name)
    return (
        f"no packets to trace live: with the {forwarding.backend.type} backend none of them pass through udptun; "
        f"`tcpdump -ni {device}` shows what the kernel carries"
    )


def _document(traced: Traced, tunnelled: Tunnelled, offset_ns: int) -> dict[str, Any]:
    head = PacketHead.of(traced.packet)
    subnet = tunnelled.tunnel.table.published.peer(traced.peer).subnet if traced.peer else None
    words = COUNTERS[traced.counter]
    return {
        "event": "packet",
        "time_ns": traced.time_ns + offset_ns,
        "direction": "outgoing" if traced.is_outgoing else "arriving",
        "device": tunnelled.device,
        "source": None if head.source is None else str(head.source),
        "destination": None if head.destination is None else str(head.destination),
        "protocol": head.protocol,
        "source_port": head.source_port,
        "port": head.port,
        "flags": head.flags,
        "fragment": head.is_fragment,
        "bytes": traced.length,
        "segments": traced.n_segments,
        "dropped": traced.n_dropped,
        "outer": None if traced.outer is None else str(traced.outer),
        "outer_port": None if traced.outer is None else traced.outer_port,
        # The entry of a peer that has gone has no subnet.
        "peer": str(subnet) if subnet is not None and subnet.prefixlen else None,
        "counter": traced.counter,
        "words": words.words,
        "docs": f"{PAGE}#{words.section}",
        "icmp_sent": traced.is_answered,
        "packet": traced.packet.hex(),
    }


def _line(document: dict[str, Any]) -> str:
    return json.dumps(document) + "\n"

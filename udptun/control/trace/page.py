"""The answer to `GET /trace?…`, docs/trace.md: the packet, its way through kernel and datapath, and its end."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING

from udptun.control.http import Request, Response
from udptun.control.running import Running
from udptun.control.trace.by_kernel import ByKernel
from udptun.control.trace.ends import Document, end_here
from udptun.control.trace.kernel import KernelView
from udptun.core.errors import KernelError, UsageError
from udptun.core.trace_request import TraceRequest
from udptun.kernel.netlink import Netlink

if TYPE_CHECKING:
    from udptun.control.trace.by_datapath import ByDatapath

SCHEMA = 1
"""Of the document.  Keys are only ever added."""


async def answer_trace(running: Running, request: Request) -> Response:
    """Of a daemon that is ready."""
    try:
        packet = TraceRequest.from_query(request.query)
        async with Netlink() as netlink:
            document = await trace(running, packet, await KernelView.of(netlink))
    except UsageError as exc:
        return Response(HTTPStatus.BAD_REQUEST, f"{exc}\n")
    except KernelError as exc:
        return Response(HTTPStatus.SERVICE_UNAVAILABLE, f"cannot trace: {exc}\n")
    return Response(HTTPStatus.OK, json.dumps(document) + "\n", "application/json")


async def trace(running: Running, packet: TraceRequest, kernel: KernelView) -> Document:
    """The document.  Raises KernelError."""
    tunnelled = running.forwarding.tunnel_of(packet.family)
    tracing: ByKernel | ByDatapath
    if tunnelled is None:
        tracing = ByKernel(running, packet, kernel)
    else:
        # Here, as in `Forwarding`: a run whose packets the kernel carries does without.
        from udptun.control.trace.by_datapath import ByDatapath

        tracing = ByDatapath(running, packet, kernel, tunnelled.tunnel)
    direction = await _direction(running, packet, kernel, is_from_peer=tracing.is_leased_by_peer(packet.source))
    if direction == "outgoing":
        way = await tracing.outgoing()
    elif direction == "arriving":
        way = await tracing.arriving()
    else:
        way = end_here("it stays on this host, and never comes into the tunnel")
    return {
        "schema": SCHEMA,
        "packet": {
            "source": str(packet.source),
            "destination": str(packet.destination),
            "protocol": packet.protocol,
            "port": packet.port,
            "bytes": packet.length,
            "ttl": packet.ttl,
            "df": packet.has_df,
        },
        "direction": direction,
        "backend": running.forwarding.backend.type,
        "kernel": None,
        "peer": None,
        "checks": [],
        "outer": None,
        "longer": None,
        "senders": [],
        "neighbour": None,
        **way,
    }


async def _direction(running: Running, packet: TraceRequest, kernel: KernelView, *, is_from_peer: bool) -> str:
    """`outgoing`, `arriving`, or `local`: from this host or a pod of it to another one of them."""
    own = running.membership.own.subnets.of(packet.family)
    if packet.outer is not None:
        return "arriving"
    if own is not None and packet.destination in own:
        is_from_here = packet.source in own or await kernel.is_of_this_host(packet.source)
        return "local" if is_from_here else "arriving"
    return "arriving" if is_from_peer else "outgoing"

"""`--mesh-port`: this host's view of its peers, for their hosts alone, at its tunnel addresses.

Pods cannot ask.  Who asks must have the tunnel address of a peer, and an answer to that address goes to the peer's host
through the tunnel, whoever has sent the question.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING

from udptun.control.http import Request, Response, Server, serve_to_some
from udptun.control.kept_text import KeptText
from udptun.core.errors import KernelError
from udptun.core.mesh import PATH
from udptun.core.network_state import IPAddress

if TYPE_CHECKING:
    from udptun.control.running import Running

LOOK_S = 1.0
"""How often to look whether this host's tunnel addresses are others, and whether a port that was taken is free."""

log = logging.getLogger(__name__)


class MeshPort:
    """The view of one run, and the port where other hosts may ask for it.  For one event loop."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._port = running.options.mesh_port
        self._text = KeptText(self._make, asyncio.Lock())
        self._servers: dict[IPAddress, Server] = {}
        self._problems: Mapping[IPAddress, str] = {}

    async def answer(self, request: Request) -> Response:
        return Response(HTTPStatus.OK, await self._text.get(), "application/json")

    async def run(self) -> None:
        """Serve it at the tunnel addresses until cancelled.  Returns where it is not to be served."""
        if not self._port:
            return
        if not self._addresses():
            kind = self._running.forwarding.backend.type
            log.warning("--mesh-port has no effect: with Backend.Type %s this host has no tunnel address", kind)
            return
        try:
            while True:
                self._look()
                await asyncio.sleep(LOOK_S)
        finally:
            for server in self._servers.values():
                server.close()
            self._servers, self._problems = {}, {}

    @property
    def problems(self) -> tuple[str, ...]:
        """A line for each address at which it cannot be served now.  May be read on another thread."""
        return tuple(self._problems.values())

    def _addresses(self) -> set[IPAddress]:
        """Those of this host's devices, one of each family that is carried by one."""
        forwarding, own = self._running.forwarding, self._running.membership.own.subnets
        subnets = [own.of(family) for family in forwarding.families if forwarding.device(family) is not None]
        return {subnet.network_address for subnet in subnets if subnet is not None}

    def _look(self) -> None:
        wanted, problems = self._addresses(), {}
        for address in self._servers.keys() - wanted:
            self._servers.pop(address).close()
        for address in wanted - self._servers.keys():
            try:
                # An address comes back with the device, and the socket goes on with it.
                self._servers[address] = serve_to_some({PATH: self.answer}, address, self._port, self._is_peer)
            except KernelError as exc:
                problems[address] = f"{exc}; it is tried again every second, and until then `udptun mesh` on other "
                problems[address] += "hosts shows this host from their side only"
                if address not in self._problems:
                    log.warning("%s", problems[address])
                continue
            log.info("mesh is served now ip=%s port=%d", address, self._port)
        self._problems = problems

    def _is_peer(self, address: IPAddress) -> bool:
        return any(table.is_first_address(address) for table in self._running.membership.tables)

    def _make(self) -> str:
        # Most daemons are never asked.
        from udptun.control.mesh.view import view

        return json.dumps(view(self._running)) + "\n"

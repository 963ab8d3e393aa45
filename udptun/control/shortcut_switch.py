"""Whether the shortcut of a tunnel shall be on: what was asked for, what this host can have, and its firewall's rules.

Imported libraries and memory are those of a host that has it on: without, this module is all there is of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from itertools import islice
from typing import TYPE_CHECKING

from udptun.backends.paths import MAX_PEERS
from udptun.core.errors import UdptunError
from udptun.core.network_state import IPNetwork
from udptun.core.offload import Offload
from udptun.core.tunnel import ShortcutMode
from udptun.core.tunnel_path import TunnelPath
from udptun.datapath.settings import PacketSettings
from udptun.datapath.tunnel import Tunnel

if TYPE_CHECKING:
    from udptun.datapath.shortcut.programs import ShortcutSettings
    from udptun.datapath.shortcut.shortcut import Shortcut

log = logging.getLogger(__name__)

_PERIOD_S = 60.0
"""The firewall's rules are read so often, and what failed or is lacking is tried again."""
_REST = 100
"""And after so many times as long as it took."""


class ShortcutSwitch:
    """For one event loop; what is said of the shortcut may be read on any thread."""

    def __init__(self, tunnel: Tunnel, alias: str) -> None:
        """`alias`: that of our devices."""
        self._tunnel, self._alias = tunnel, alias
        self._mode = ShortcutMode.OFF
        self._underlay = ""
        self._packets: PacketSettings | None = None
        self._shortcut: Shortcut | None = None
        self._changed = asyncio.Event()
        self._failure = ""
        """What went wrong the last time that it was decided; empty when nothing did."""
        self.switched: Callable[[], None] = lambda: None
        """Called when `takes` is another than before."""

    def use(self, mode: ShortcutMode, underlay: str, packets: PacketSettings) -> None:
        """From now on.  `underlay` is the name of the link that datagrams leave by."""
        self._mode, self._underlay, self._packets = mode, underlay, packets
        if self._shortcut is not None:
            self._shortcut.try_soon()
        self._changed.set()

    async def run(self) -> None:
        """Keep it so, until cancelled.  It may be run again then."""
        clock = asyncio.get_running_loop().time
        async with asyncio.TaskGroup() as tasks:
            task: asyncio.Task[None] | None = None
            while True:
                self._changed.clear()
                began_s, wait_s, may_change = clock(), None, self._mode is ShortcutMode.AUTO
                if self._mode is not ShortcutMode.OFF and task is None:
                    shortcut = self._shortcut = self._shortcut or self._make()
                    task = tasks.create_task(shortcut.run(), name="shortcut")
                if self._shortcut is not None:
                    settings, why = await self._decide_anyhow()
                    self._shortcut.want(settings, why)
                    has_detour = self._shortcut.is_detour_wanted
                    self._shortcut.allow_detour(await self._find_objection_to_detour() if has_detour else None)
                    may_change |= has_detour or (self._mode is ShortcutMode.REQUIRE and settings is None)
                if may_change:
                    wait_s = max(_PERIOD_S, _REST * (clock() - began_s))
                try:
                    async with asyncio.timeout(wait_s):
                        await self._changed.wait()
                except TimeoutError:
                    continue

    @property
    def is_on(self) -> bool:
        return self._shortcut is not None and self._shortcut.is_on

    @property
    def takes(self) -> bool | None:
        """Whether our kernel takes what a peer's has encapsulated; None: that is not known yet."""
        if self._shortcut is not None:
            return self._shortcut.takes
        return False if self._mode is ShortcutMode.OFF else None

    @property
    def problems(self) -> tuple[str, ...]:
        """A line when it is required and off, or has lost packets.  May be read on another thread."""
        shortcut = self._shortcut
        if shortcut is None or self._mode is ShortcutMode.OFF:
            return ()
        if self._mode is ShortcutMode.AUTO or shortcut.is_on:
            return tuple(filter(None, [shortcut.detour_problem]))
        return (f"the shortcut is required and {shortcut.state}; the workers carry all packets meanwhile",)

    def document(self) -> dict[str, object]:
        """Keys of `datapath` in docs/status.md."""
        shortcut = self._shortcut
        if self._mode is ShortcutMode.OFF or shortcut is None:
            return {"shortcut": "off", "shortcut_passed": {}, "shortcut_detour": None}
        passed: Mapping[str, int] = shortcut.passed
        return {"shortcut": shortcut.state, "shortcut_passed": dict(passed), "shortcut_detour": shortcut.detour}

    def is_sent_to(self, subnet: IPNetwork) -> bool:
        """Whether packets to the peer leave by the kernel."""
        return self._shortcut is not None and self._shortcut.is_sent_to(subnet)

    async def _find_objection(self, packets: PacketSettings) -> str:
        """What the host's firewall or IPsec has against it; empty when nothing."""
        # Here, because a host without it does not need the modules.
        from udptun.firewall.port_rules import find_drop, find_objection
        from udptun.kernel.ipsec import find_policy, read_policies

        # Of all peers: a policy may name a single one.
        policies = await read_policies()
        if policies and (why := find_policy(policies, self._path(packets, len(self._tunnel.peers.subnets)))):
            return why
        return await find_objection(packets.port, self._underlay) or await find_drop(self._path(packets, MAX_PEERS))

    async def _find_objection_to_detour(self) -> str | None:
        """What the host's firewall would do to super-packets that take the detour; empty when nothing certainly.

        They pass it even where the shortcut is required, as what arrives at any port of this host.  None: not known.
        """
        from udptun.datapath.shortcut.detour import DETOUR_PORT
        from udptun.firewall.port_rules import find_drop

        packets = self._packets
        if packets is None or not isinstance(packets.underlay_address, IPv4Address):
            return None
        path = self._path(packets, MAX_PEERS)
        try:
            return await find_drop(replace(path, port=DETOUR_PORT, looks_answered=False, is_sent_back=False))
        except Exception as exc:
            # As `_decide_anyhow`.
            return f"whether the firewall drops UDP port {DETOUR_PORT} is not known: {exc}"

    def _path(self, packets: PacketSettings, n: int) -> TunnelPath:
        """That of the datagrams between us and the first `n` peers."""
        entries = filter(None, map(self._tunnel.peers.entry, islice(self._tunnel.peers.subnets, n)))
        ends = [(it.remote.address, it.remote.port) for it in entries if it.remote.address.version == 4]
        return TunnelPath.to_peers(self._underlay, packets.underlay_address, packets.port, ends, looks_answered=True)

    def _make(self) -> Shortcut:
        from udptun.datapath.shortcut.shortcut import Shortcut

        shortcut = Shortcut(self._tunnel, self._alias)
        shortcut.switched = lambda: self.switched()
        shortcut.detour_wanted = self._changed.set
        return shortcut

    async def _decide_anyhow(self) -> tuple[ShortcutSettings | None, str]:
        """As `_decide`; off when that fails, which is no reason to end the daemon."""
        try:
            decided = await self._decide()
        except Exception as exc:
            is_known = isinstance(exc, UdptunError)
            failure = str(exc) if is_known else f"unexpected {type(exc).__name__}: {exc}; the log has more"
            if failure != self._failure:
                more = None if is_known else exc
                log.warning("the shortcut stays off, and is tried again: %s", failure, exc_info=more)
            self._failure = failure
            return None, failure
        self._failure = ""
        return decided

    async def _decide(self) -> tuple[ShortcutSettings | None, str]:
        """The settings that it shall have, or why it shall be off."""
        from udptun.datapath.shortcut.programs import ShortcutSettings, find_lack

        packets = self._packets
        if self._mode is ShortcutMode.OFF or packets is None:
            return None, "Shortcut is off"
        if packets.own_subnet is None or not isinstance(packets.underlay_address, IPv4Address):
            return None, "it carries IPv4 over IPv4 alone"
        if why := find_lack():
            return None, why
        if self._mode is ShortcutMode.AUTO and (why := await self._find_objection(packets)):
            return None, f"{why}; the shortcut passes such rules by: set Shortcut to require if that may be"
        carries_ecn = Offload.ECN in packets.offload
        return (
            ShortcutSettings(
                self._underlay,
                packets.underlay_address,
                packets.port,
                packets.own_subnet,
                packets.mtu,
                carries_ecn,
            ),
            "",
        )

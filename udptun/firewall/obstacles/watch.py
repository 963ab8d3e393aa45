"""Looks for packet filters of others that drop the overlay's packets, and says so.

A packet between pods is lost when any chain drops it, whatever flannel's rules accept.  So is a datagram of the tunnel,
about which flannel has no rules.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from udptun.core.errors import KernelError
from udptun.core.pod_path import PodPath
from udptun.core.tunnel_path import TunnelPath
from udptun.firewall.ruleset_notices import RulesetNotice
from udptun.kernel.netlink import Netlink
from udptun.kernel.pod_links import find_pod_links
from udptun.kernel.problem_lines import ProblemLines

if TYPE_CHECKING:
    from udptun.firewall.obstacles.judge import Way
    from udptun.firewall.obstacles.kernel_rules import Chains
    from udptun.firewall.obstacles.ruleset import Traffic

log = logging.getLogger(__name__)

_PERIOD_S = 30.0
"""nf_tables is read again after a notice, and this often: the kernel's notices do not tell of the elements of sets."""
_REST = 100
"""And not before so many times as long as the last reading used the processor: kube-proxy changes thousands of rules
all day long.  How long it took is another thing on a busy machine, where a line would outlive its cause by seconds."""


async def find_ways(pod_paths: Iterable[PodPath], tunnel_paths: Iterable[TunnelPath]) -> list[Way]:
    """Where packets of ours pass: those of pods, if there are any here, and the tunnel's own, if there are peers.

    Raises KernelError.
    """
    # Not before: the daemon is ready sooner without them.
    from udptun.firewall.obstacles.judge import PodWay, TunnelWay

    ways: list[Way] = [PodWay(path, links) for path in pod_paths if (links := await find_pod_links(path))]
    return [*ways, *[TunnelWay(await _with_known_link(path)) for path in tunnel_paths if path.peers]]


async def _with_known_link(path: TunnelPath) -> TunnelPath:
    """Without the link, where that does not have the address: datagrams to it may then come in by any."""
    async with Netlink() as kernel:
        addresses = await kernel.addresses(family=path.family)
    indexes = {it.link_index for it in addresses if it.ip == path.address}
    is_there = any(index in indexes and name == path.link for index, name in socket.if_nameindex())
    return path if is_there else replace(path, link=None)


def find_link_names(ways: Iterable[Way]) -> Mapping[int, str]:
    """The names of the links that matter on these ways, by index."""
    wanted = frozenset().union(*(way.links for way in ways))
    return {index: name for index, name in socket.if_nameindex() if name in wanted}


async def find_lines(ways: Sequence[Way]) -> list[str]:
    """What drops packets on these ways now.  Raises KernelError where the rules cannot be read."""
    from udptun.firewall.obstacles.kernel_rules import NO_NF_TABLES, read_legacy, read_nft

    traffics = _traffics_of(ways)
    try:
        nft, _ = await read_nft(find_link_names(ways), traffics)
    except KernelError as exc:
        if exc.errno not in NO_NF_TABLES:
            raise
        nft = {}
    return _judged(ways, nft, read_legacy(traffics))


def _traffics_of(ways: Iterable[Way]) -> list[Traffic]:
    return list(dict.fromkeys(traffic for way in ways for traffic in way.traffics))


def _judged(ways: Iterable[Way], nft: Chains, legacy: Chains) -> list[str]:
    chains = {traffic: [*nft.get(traffic, ()), *found] for traffic, found in legacy.items()}
    return [line for way in ways for line in way.judge(chains)]


class Obstacles:
    """What keeps the overlay's packets from passing, as of the latest `look`.  For one event loop."""

    def __init__(
        self,
        find_pod_paths: Callable[[], Sequence[PodPath]],
        find_tunnel_paths: Callable[[], Sequence[TunnelPath]],
    ) -> None:
        """These say where the packets go now, by each address family that we carry, and that of the underlay."""
        self._find_pod_paths = find_pod_paths
        self._find_tunnel_paths = find_tunnel_paths
        self._lines = ProblemLines(log, "nothing drops the overlay's packets any more")
        self._nft: Chains = {}
        self._nft_seen: frozenset[tuple[int, str, str]] = frozenset()
        """Family, table and name of the chains in `_nft`."""
        self._is_stale = True
        """A notice says that `_nft` has changed."""
        self._nft_read_s = self._nft_rest_s = float("-inf")
        self._links: Mapping[int, str] = {}
        self._judged: object = None
        """What the lines are about."""

    @property
    def problems(self) -> tuple[str, ...]:
        return self._lines.lines

    def note(self, notices: frozenset[RulesetNotice] | None) -> None:
        """The kernel has reported these changes of nftables rules; None: anything may have changed."""
        self._is_stale |= notices is None or any(
            notice.chain is None or notice.is_base or (notice.family, notice.table, notice.chain) in self._nft_seen
            for notice in notices
        )

    async def look(self) -> None:
        """Look at what has changed, and judge it.  What cannot be read is left out."""
        try:
            ways = await find_ways(self._find_pod_paths(), self._find_tunnel_paths())
        except KernelError as exc:
            log.debug("packet filters not looked at error=%s", exc)
            return
        if not ways:
            self._lines.replace(())
            self._judged = None
            return
        # Not before, as in `find_ways`.
        from udptun.firewall.obstacles.kernel_rules import read_legacy

        traffics = _traffics_of(ways)
        await self._read_nft(ways, traffics)
        legacy = read_legacy(traffics)
        question = (ways, self._nft_read_s)
        if any(legacy.values()) or question != self._judged:
            self._lines.replace(_judged(ways, self._nft, legacy))
            self._judged = None if any(legacy.values()) else question

    async def _read_nft(self, ways: Sequence[Way], traffics: Sequence[Traffic]) -> None:
        """Read nf_tables if it may have changed."""
        from udptun.firewall.obstacles.kernel_rules import read_nft

        links = find_link_names(ways)
        now_s = asyncio.get_running_loop().time()
        is_due = self._is_stale or (links, set(traffics)) != (self._links, set(self._nft))
        is_due |= now_s >= self._nft_read_s + _PERIOD_S
        if now_s < self._nft_rest_s or not is_due:
            return
        self._is_stale, self._links = False, links
        used_s = time.thread_time()
        try:
            self._nft, self._nft_seen = await read_nft(links, traffics)
        except KernelError as exc:
            # No nf_tables in this kernel, or it changes all the time.
            log.debug("nftables rules not read error=%s", exc)
            self._nft, self._nft_seen = {traffic: [] for traffic in traffics}, frozenset()
        self._nft_read_s = asyncio.get_running_loop().time()
        self._nft_rest_s = self._nft_read_s + _REST * (time.thread_time() - used_s)

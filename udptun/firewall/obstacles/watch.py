"""Looks for packet filters of others that drop the overlay's packets, and says so.

A packet between pods is lost when any chain drops it, whatever flannel's rules accept.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.core.pod_path import PodPath
from udptun.firewall.ruleset_notices import RulesetNotice
from udptun.kernel.pod_links import find_pod_links
from udptun.kernel.problem_lines import ProblemLines

if TYPE_CHECKING:
    from udptun.firewall.obstacles.ruleset import BaseChain

log = logging.getLogger(__name__)

_PERIOD_S = 30.0
"""nf_tables is read again after a notice, and this often: the kernel's notices do not tell of the elements of sets."""
_REST = 100
"""And not before so many times as long as the last reading took: kube-proxy changes thousands of rules all day long."""


class Obstacles:
    """What keeps the overlay's packets from passing, as of the latest `look`.  For one event loop."""

    def __init__(self, find_paths: Callable[[], Sequence[PodPath]]) -> None:
        """`find_paths` says where the packets go now, by each address family that we carry."""
        self._find_paths = find_paths
        self._lines = ProblemLines(log, "nothing drops the overlay's packets any more")
        self._nft: dict[Family, list[BaseChain]] = {}
        self._nft_seen: frozenset[tuple[int, str, str]] = frozenset()
        """Family, table and name of the chains in `_nft`."""
        self._is_stale = True
        """A notice says that `_nft` has changed."""
        self._nft_read_s = self._nft_rest_s = float("-inf")
        self._links: dict[int, str] = {}
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
        # Not before: the daemon is ready sooner without them.
        from udptun.firewall.obstacles.judge import judge
        from udptun.firewall.obstacles.kernel_rules import read_legacy

        try:
            paths = [(path, links) for path in self._find_paths() if (links := await find_pod_links(path))]
        except KernelError as exc:
            log.debug("packet filters not looked at error=%s", exc)
            return
        if not paths:
            self._lines.replace(())
            self._judged = None
            return
        await self._read_nft(paths)
        legacy = {path.family: list(read_legacy(path.family)) for path, _ in paths}
        question = (paths, self._nft_read_s)
        if any(legacy.values()) or question != self._judged:
            lines = [
                line
                for path, links in paths
                for line in judge(path, links, [*self._nft.get(path.family, ()), *legacy[path.family]])
            ]
            self._lines.replace(lines)
            self._judged = None if any(legacy.values()) else question

    async def _read_nft(self, paths: Sequence[tuple[PodPath, Sequence[str]]]) -> None:
        """Read nf_tables if it may have changed."""
        from udptun.firewall.obstacles.kernel_rules import read_nft

        links = {}
        for name in dict.fromkeys(name for path, pod_links in paths for name in (path.device, *pod_links)):
            try:
                links[socket.if_nametoindex(name)] = name
            except OSError:
                # It has gone meanwhile.
                continue
        now_s = asyncio.get_running_loop().time()
        families = {path.family for path, _ in paths}
        is_due = self._is_stale or (links, families) != (self._links, set(self._nft))
        is_due |= now_s >= self._nft_read_s + _PERIOD_S
        if now_s < self._nft_rest_s or not is_due:
            return
        self._is_stale, self._links = False, links
        try:
            read = {family: await read_nft(links, family) for family in families}
        except KernelError as exc:
            # No nf_tables in this kernel, or it changes all the time.
            log.debug("nftables rules not read error=%s", exc)
            read = {family: ([], frozenset()) for family in families}
        self._nft = {family: chains for family, (chains, _) in read.items()}
        self._nft_seen = frozenset().union(*(seen for _, seen in read.values()))
        self._nft_read_s = asyncio.get_running_loop().time()
        self._nft_rest_s = self._nft_read_s + _REST * (self._nft_read_s - now_s)

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

    def __init__(self, find_path: Callable[[], PodPath | None]) -> None:
        """`find_path` says where the packets go now; None: we carry none."""
        self._find_path = find_path
        self._lines = ProblemLines(log, "nothing drops the overlay's packets any more")
        self._nft: list[BaseChain] = []
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

        path = self._find_path()
        try:
            pod_links = () if path is None else await find_pod_links(path)
        except KernelError as exc:
            log.debug("packet filters not looked at error=%s", exc)
            return
        if path is None or not pod_links:
            self._lines.replace(())
            self._judged = None
            return
        await self._read_nft((path.device, *pod_links))
        legacy = list(read_legacy())
        question = (path, pod_links, self._nft_read_s)
        if legacy or question != self._judged:
            self._lines.replace(judge(path, pod_links, [*self._nft, *legacy]))
            self._judged = None if legacy else question

    async def _read_nft(self, link_names: Sequence[str]) -> None:
        """Read nf_tables if it may have changed."""
        from udptun.firewall.obstacles.kernel_rules import read_nft

        links = {}
        for name in link_names:
            try:
                links[socket.if_nametoindex(name)] = name
            except OSError:
                # It has gone meanwhile.
                continue
        now_s = asyncio.get_running_loop().time()
        is_due = self._is_stale or links != self._links or now_s >= self._nft_read_s + _PERIOD_S
        if now_s < self._nft_rest_s or not is_due:
            return
        self._is_stale, self._links = False, links
        try:
            self._nft, self._nft_seen = await read_nft(links)
        except KernelError as exc:
            # No nf_tables in this kernel, or it changes all the time.
            log.debug("nftables rules not read error=%s", exc)
            self._nft, self._nft_seen = [], frozenset()
        self._nft_read_s = asyncio.get_running_loop().time()
        self._nft_rest_s = self._nft_read_s + _REST * (self._nft_read_s - now_s)

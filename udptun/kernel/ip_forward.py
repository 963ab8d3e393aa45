"""Whether the kernel forwards packets between pods and other hosts: its settings for all links, and of each link.

Something else on the host sets them, a CNI plugin or Docker.  Where they are off, no pod reaches another host, and
nobody says so.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncGenerator, Callable, Sequence

from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.core.pod_path import PodPath
from udptun.kernel.notices import datagrams
from udptun.kernel.pod_links import find_pod_links
from udptun.kernel.problem_lines import ProblemLines
from udptun.kernel.sysctl import read_sysctl
from udptun.kernel.watch_loop import Pace, WatchLoop

log = logging.getLogger(__name__)

_PACE = Pace(settle_s=0.05, max_settle_s=0.5, storm_s=1.0, period_s=30.0, retry_s=1.0)
_RTMGRP_IPV4_IFADDR, _RTMGRP_IPV4_NETCONF = 1 << 4, 1 << 23
_RTMGRP_IPV6_IFADDR, _RTMGRP_IPV6_NETCONF = 1 << 8, 1 << 24
"""linux/rtnetlink.h.  The kernel reports a changed forwarding setting in the second ones (RTNLGRP_IPV4_NETCONF)."""


class IpForwardWatch:
    """Looks after every notice and every 30 s, while `run` is running.  Changes nothing: the settings are the host's.

    All methods belong to one event loop.
    """

    def __init__(self, find_paths: Callable[[], Sequence[PodPath]]) -> None:
        """`find_paths` says where the packets go now, by each address family that we carry."""
        self._find_paths = find_paths
        self._lines = ProblemLines(log, "packets of the overlay are forwarded again")
        self._loop = WatchLoop("forwarding settings", _notices, self._look, _PACE)

    @property
    def problems(self) -> tuple[str, ...]:
        """A line for each setting that keeps packets from pods, or from other hosts."""
        return (*self._lines.lines, *filter(None, [self._loop.problem]))

    async def run(self) -> None:
        """Look now and whenever it is due, until cancelled."""
        await self._loop.run()

    async def _look(self) -> bool:
        try:
            links = {path: await find_pod_links(path) for path in self._find_paths()}
        except KernelError as exc:
            log.debug("forwarding settings not looked at error=%s", exc)
            return False
        # On a host without pods there is nothing to forward yet.  The first pod brings the setting with it.
        faults = [
            line for path, pod_links in links.items() if pod_links for line in find_forwarding_faults(path, pod_links)
        ]
        self._lines.replace(faults)
        return True


def find_forwarding_faults(path: PodPath, pod_links: Sequence[str]) -> list[str]:
    """A line for each setting that keeps packets from passing between these links and the path's device."""
    find = _find_ipv4_faults if path.family is Family.IPV4 else _find_ipv6_faults
    return find((path.device, *pod_links))


def _find_ipv4_faults(links: Sequence[str]) -> list[str]:
    if read_sysctl("net/ipv4/ip_forward") == "0":
        return [
            "net.ipv4.ip_forward is 0, so no packet passes between pods here and other hosts; "
            "run `sysctl -w net.ipv4.ip_forward=1`, and have /etc/sysctl.d keep it"
        ]
    return [
        f"net/ipv4/conf/{link}/forwarding is 0, so packets that come in by {link} are not forwarded; "
        f"run `sysctl -w net/ipv4/conf/{link}/forwarding=1`"
        for link in links
        if read_sysctl(f"net/ipv4/conf/{link}/forwarding") == "0"
    ]


def _find_ipv6_faults(links: Sequence[str]) -> list[str]:
    # A link's own `forwarding` says whether it takes router advertisements, and not whether packets are forwarded.
    is_forced = all(read_sysctl(f"net/ipv6/conf/{link}/force_forwarding") == "1" for link in links)
    if read_sysctl("net/ipv6/conf/all/forwarding") != "0" or is_forced:
        return []
    return [
        "net.ipv6.conf.all.forwarding is 0, so no IPv6 packet passes between pods here and other hosts; "
        "run `sysctl -w net.ipv6.conf.all.forwarding=1`, and have /etc/sysctl.d keep it"
    ]


def _notices() -> AsyncGenerator[bytes | None, None]:
    ipv4, ipv6 = _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV4_NETCONF, _RTMGRP_IPV6_IFADDR | _RTMGRP_IPV6_NETCONF
    return datagrams(socket.NETLINK_ROUTE, ipv4 | ipv6)

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
from udptun.kernel.netlink import Netlink
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

_RTPROT_RA = 9
"""linux/rtnetlink.h: of routes that routers have advertised."""


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
            faults = [line for path in self._find_paths() for line in await find_forwarding_faults(path)]
        except KernelError as exc:
            log.debug("forwarding settings not looked at error=%s", exc)
            return False
        self._lines.replace(faults)
        return True


async def find_forwarding_faults(path: PodPath) -> list[str]:
    """A line for each setting that keeps packets from passing between pods here and the path's device.

    And one for each link that loses its address by what lets them pass.  Raises KernelError.
    """
    pod_links = await find_pod_links(path)
    # On a host without pods there is nothing to forward yet.  The first pod brings the setting with it.
    if not pod_links:
        return []
    links = (path.device, *pod_links)
    if path.family is Family.IPV4:
        return _find_ipv4_faults(links)
    return _find_ipv6_faults(links, await _find_advertised_links())


async def _find_advertised_links() -> list[str]:
    """The links that have an address or a route by router advertisements, and whose kernel heeds them no longer where
    it forwards.

    Where a program heeds them, as networkd does, it has set `accept_ra` to 0.
    """
    async with Netlink() as kernel:
        addresses, routes = await kernel.addresses(family=Family.IPV6), await kernel.routes(family=Family.IPV6)
        links = {link.index: link.name for link in await kernel.links()}
    indexes = {it.link_index for it in addresses if not (it.is_permanent or it.ip.is_link_local)}
    indexes |= {it.oif for it in routes if it.protocol == _RTPROT_RA and it.oif is not None}
    names = sorted(links[index] for index in indexes if index in links)
    return [name for name in names if read_sysctl(f"net/ipv6/conf/{name}/accept_ra") == "1"]


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


def _find_ipv6_faults(links: Sequence[str], advertised: Sequence[str]) -> list[str]:
    # A link's own `forwarding` says whether it takes router advertisements, and not whether packets are forwarded.
    is_forced = all(read_sysctl(f"net/ipv6/conf/{link}/force_forwarding") == "1" for link in links)
    if read_sysctl("net/ipv6/conf/all/forwarding") == "0" and not is_forced:
        kept = "".join(f"net/ipv6/conf/{link}/accept_ra=2 " for link in advertised)
        why = f" (without accept_ra=2 {' and '.join(advertised)} would lose what routers advertise)" if kept else ""
        return [
            "net.ipv6.conf.all.forwarding is 0, so no IPv6 packet passes between pods here and other hosts; "
            f"run `sysctl -w {kept}net.ipv6.conf.all.forwarding=1`{why}, and have /etc/sysctl.d keep it"
        ]
    return [
        f"{link} heeds no router advertisements while net/ipv6/conf/{link}/forwarding is 1, so it loses the default "
        f"route and then the address that it has by them; run `sysctl -w net/ipv6/conf/{link}/accept_ra=2`, and have "
        "/etc/sysctl.d keep it"
        for link in advertised
        if read_sysctl(f"net/ipv6/conf/{link}/forwarding") == "1"
    ]


def _notices() -> AsyncGenerator[bytes | None, None]:
    ipv4, ipv6 = _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV4_NETCONF, _RTMGRP_IPV6_IFADDR | _RTMGRP_IPV6_NETCONF
    return datagrams(socket.NETLINK_ROUTE, ipv4 | ipv6)

"""Whether the kernel forwards packets between pods and other hosts: ip_forward, and the setting of each link.

Something else on the host sets them, a CNI plugin or Docker.  Where they are off, no pod reaches another host, and
nobody says so.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncGenerator, Callable, Sequence

from udptun.core.errors import KernelError
from udptun.core.pod_path import PodPath
from udptun.kernel.notices import datagrams
from udptun.kernel.pod_links import find_pod_links
from udptun.kernel.problem_lines import ProblemLines
from udptun.kernel.sysctl import read_sysctl
from udptun.kernel.watch_loop import Pace, WatchLoop

log = logging.getLogger(__name__)

_PACE = Pace(settle_s=0.05, max_settle_s=0.5, storm_s=1.0, period_s=30.0, retry_s=1.0)
_RTMGRP_IPV4_IFADDR, _RTMGRP_IPV4_NETCONF = 1 << 4, 1 << 23
"""linux/rtnetlink.h.  The kernel reports a changed forwarding setting in the second one (RTNLGRP_IPV4_NETCONF)."""


class IpForwardWatch:
    """Looks after every notice and every 30 s, while `run` is running.  Changes nothing: the settings are the host's.

    All methods belong to one event loop.
    """

    def __init__(self, find_path: Callable[[], PodPath | None]) -> None:
        """`find_path` says where the packets go now; None: we carry none."""
        self._find_path = find_path
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
        path = self._find_path()
        try:
            pod_links = () if path is None else await find_pod_links(path)
        except KernelError as exc:
            log.debug("forwarding settings not looked at error=%s", exc)
            return False
        # On a host without pods there is nothing to forward yet.  The first pod brings the setting with it.
        self._lines.replace(_find_faults((path.device, *pod_links)) if path is not None and pod_links else ())
        return True


def _find_faults(links: Sequence[str]) -> list[str]:
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


def _notices() -> AsyncGenerator[bytes | None, None]:
    return datagrams(socket.NETLINK_ROUTE, _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV4_NETCONF)

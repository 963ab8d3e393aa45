"""Every check, and how they are run: at the same time, each with an end.

docs/doctor.md has the same table; a test holds the two together.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from udptun.core.errors import UdptunError, one_line
from udptun.doctor import daemon, files, firewall, kernel, others, paths, store
from udptun.doctor.endpoints import Endpoint
from udptun.doctor.facts import Facts
from udptun.doctor.finding import Finding, NotHereError, Severity
from udptun.doctor.sample import sample

log = logging.getLogger(__name__)

_CHECK_S = 4.0


@dataclass(frozen=True, slots=True)
class Check:
    """`looks_at` is what it looks at, `remedy` in short what one does about what it finds; `worst` is the worst that
    it says.

    `look` finds what is wrong.  It raises NotHereError where it cannot look.
    """

    name: str
    looks_at: str
    worst: Severity
    remedy: str
    look: Callable[[Facts], Awaitable[list[Finding]]]


NOTE, WARNING, ERROR = Severity

CHECKS = (
    Check("daemon", "whether a daemon answers and is ready", ERROR, "start it; see what it waits for", daemon.daemon),
    Check(
        "datapath",
        "its processes and workers, and what they have given up",
        ERROR,
        "the daemon's log says why",
        daemon.datapath,
    ),
    Check("tun-device", "whether `/dev/net/tun` opens", ERROR, "`modprobe tun`, mount it", kernel.tun_device),
    Check("capabilities", "NET_ADMIN and NET_RAW of the daemon", ERROR, "give them to it", kernel.capabilities),
    Check("cgroup-limits", "CPU and memory limits", WARNING, "remove them", kernel.cgroup_limits),
    Check("kernel-version", "kernels that corrupt large sends", ERROR, "another kernel", kernel.kernel_version),
    Check(
        "ipv6-in-kernel",
        "IPv6 where the config enables it, also of the pods' bridge",
        ERROR,
        "boot with it, `sysctl -w`",
        kernel.ipv6_in_kernel,
    ),
    Check("clock", "the clock, NTP, and what leases say of it", ERROR, "NTP", kernel.clock),
    Check("underlay", "the interface to the other hosts", ERROR, "bring it up", kernel.underlay_interface),
    Check("forwarding", "forwarding of both families, of all links involved", ERROR, "`sysctl -w`", kernel.forwarding),
    Check(
        "reverse-path",
        "strict rp_filter, and packets that come in by another link",
        ERROR,
        "`rp_filter=2`, mend the route",
        kernel.reverse_path,
    ),
    Check(
        "bridge-netfilter", "br_netfilter, in Kubernetes", WARNING, "`modprobe br_netfilter`", kernel.bridge_netfilter
    ),
    Check(
        "packet-filters",
        "rules of others that drop packets of pods, or the tunnel's own",
        ERROR,
        "accept them there",
        firewall.packet_filters,
    ),
    Check("firewall-tools", "the programs that our rules are set with", ERROR, "install them", firewall.firewall_tools),
    Check(
        "reachability",
        "each peer: a ping through the tunnel, one beside it, its UDP port",
        ERROR,
        "open the port",
        paths.reachability,
    ),
    Check(
        "path-mtu",
        "whether packets of full size reach each peer and come back",
        WARNING,
        "mend the path",
        paths.path_mtu,
    ),
    Check("mtu", "the MTU in use against the underlay's and the pods'", WARNING, "set Backend.MTU", paths.mtu_in_use),
    Check("peer-routes", "the routes to the peers' addresses", ERROR, "mend the route", paths.peer_routes),
    Check("store", "whether the store answers", ERROR, "as its message says", store.store),
    Check(
        "store-endpoints",
        "each server of the store: does it answer, within 500 ms",
        WARNING,
        "look at that server",
        store.store_endpoints,
    ),
    Check(
        "network-config", "net-conf.json, and whether the daemon runs with it", ERROR, "mend it", store.network_config
    ),
    Check("own-lease", "our lease in the store", ERROR, "the daemon writes it again", store.own_lease),
    Check("pod-cidr", "podCIDR and annotations of our node", ERROR, "give the node one", store.pod_cidr),
    Check("unused-leases", "leases that are skipped", WARNING, "mend or delete them", store.unused_leases),
    Check("subnet-env", "subnet.env against the daemon", ERROR, "restart the daemon", files.subnet_env_file),
    Check(
        "cni-configuration",
        "which configuration runtimes take in `/etc/cni/net.d`",
        ERROR,
        "delete the other one",
        files.cni_configuration,
    ),
    Check("cni-plugins", "the plugins that it names", ERROR, "install them", files.cni_plugins),
    Check(
        "directories",
        "who may write the daemon's directories, and their room",
        ERROR,
        "`chmod`, make room",
        files.directories,
    ),
    Check("two-daemons", "flanneld, or a second daemon, beside ours", ERROR, "stop one of them", others.two_daemons),
    Check("tunnel-port", "who has the UDP port while no daemon runs", ERROR, "stop that program", others.tunnel_port),
    Check(
        "leftover-devices", "devices of flannel or of another run", WARNING, "`ip link delete`", others.leftover_devices
    ),
    Check("leftover-routes", "routes of another run", WARNING, "`udptun cleanup`", others.leftover_routes),
    Check("foreign-routes", "routes of others into Network", ERROR, "delete them", others.foreign_routes),
    Check(
        "overlapping-networks",
        "addresses here in Network, as of old cni0",
        ERROR,
        "delete the bridge, or another Network",
        others.overlapping_networks,
    ),
    Check(
        "network-managers",
        "NetworkManager, networkd, dhcpcd: do they touch our device",
        WARNING,
        "exclude our device",
        others.network_managers,
    ),
)

PROBLEM_LINES = "problem-lines"
"""The last check: what the daemon says is wrong and no other has found."""


@dataclass(frozen=True, slots=True)
class Examination:
    """`findings` come with their checks' names, the worst first.  `not_looked_at`: why, by the name of the check."""

    findings: tuple[tuple[str, Finding], ...]
    not_looked_at: dict[str, str]
    n_checks: int
    peers: str
    """How many were asked."""
    endpoints: tuple[Endpoint, ...] = ()
    """The servers of the store."""

    @property
    def exit_status(self) -> int:
        """0: nothing worse than a note; 1: warnings; 2: errors."""
        worst = max((finding.severity for _, finding in self.findings), default=NOTE)
        return int(worst) - 1


async def examine(facts: Facts) -> Examination:
    """Run every check."""
    results = await asyncio.gather(*(_run(check, facts) for check in CHECKS))
    found: list[tuple[str, Finding]] = []
    not_looked_at: dict[str, str] = {}
    for check, result in zip(CHECKS, results, strict=True):
        if isinstance(result, str):
            not_looked_at[check.name] = result
        else:
            found += [(check.name, finding) for finding in result]
    try:
        found += [(PROBLEM_LINES, finding) for finding in daemon.problem_lines(facts, found)]
    except Exception as exc:
        not_looked_at[PROBLEM_LINES] = _why_not(PROBLEM_LINES, exc)
    found.sort(key=lambda it: -it[1].severity)
    return Examination(tuple(found), not_looked_at, len(CHECKS) + 1, str(sample(facts.peers)), facts.endpoints)


async def _run(check: Check, facts: Facts) -> list[Finding] | str:
    """What it has found, or why it could not look."""
    try:
        async with asyncio.timeout(_CHECK_S):
            return await check.look(facts)
    except TimeoutError:
        return f"it took more than {_CHECK_S:.0f} s"
    except Exception as exc:
        return _why_not(check.name, exc)


def _why_not(name: str, exc: Exception) -> str:
    """Why that check could not look, one line.  A fault of ours is logged with its traceback."""
    if isinstance(exc, NotHereError):
        return str(exc)
    if isinstance(exc, (UdptunError, OSError)):
        return one_line(f"it could not look: {exc}")
    log.error("check=%s", name, exc_info=exc)
    return one_line(f"it could not look: {type(exc).__name__}: {exc}")

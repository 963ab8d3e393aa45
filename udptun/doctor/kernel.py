"""What the kernel of this host has and how it is set: TUN device, capabilities, limits, forwarding, clock."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

from udptun.backends.probe import why_no_tun
from udptun.config.store_flags import StoreKind
from udptun.core.family import Family
from udptun.core.network_state import IPAddress
from udptun.core.offload import corrupted_by, names
from udptun.doctor.daemon import severity_of
from udptun.doctor.facts import Facts
from udptun.doctor.finding import Finding, NotHereError, Severity
from udptun.doctor.sample import sample
from udptun.kernel import cgroup
from udptun.kernel.clock_sync import is_clock_synchronised
from udptun.kernel.ip_forward import find_forwarding_faults
from udptun.kernel.netlink import Netlink
from udptun.kernel.pod_links import find_pod_links
from udptun.kernel.sysctl import read_sysctl
from udptun.stores.base import LEASE_TTL_S

_CAP_NET_ADMIN, _CAP_NET_RAW = 12, 13
_STRICT = "1"
"""Of rp_filter: a packet is dropped unless its source is reached by the link that it has come in by (RFC 3704)."""
_EARLIEST_S = 1_735_689_600.0
"""2025-01-01: no host of today is before it."""
_CLOCK_S = 300.0
"""So far two clocks may be apart."""


async def tun_device(facts: Facts) -> list[Finding]:
    if not facts.has_datapath:
        raise NotHereError(f"Backend.Type {facts.backend_type} needs none")
    if not (error := why_no_tun()):
        return []
    remedy = {
        "ENOENT": "`modprobe tun`; in a container mount the host's /dev/net/tun",
        "ENODEV": "`modprobe tun`, and have /etc/modules-load.d load it",
        "EPERM": "allow the device c 10:200 to the container (a device, or privileged)",
        "EACCES": "run as root, or `chmod 0666 /dev/net/tun` as udev has it",
    }.get(error, "`modprobe tun`")
    cause = f"/dev/net/tun cannot be opened ({error}), so no tunnel can be made at the next start"
    return [Finding(Severity.ERROR, "/dev/net/tun", cause, remedy)]


async def capabilities(facts: Facts) -> list[Finding]:
    """Of the daemon; without one, of this process, which has most often what a daemon would have."""
    status = _read(Path(f"/proc/{facts.daemon_pid or 'self'}/status"))
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    if effective is None:
        raise NotHereError("the daemon's process cannot be seen from here")
    has, who = int(effective[1], 16), "the daemon" if facts.daemon_pid else "this process"
    found = []
    if not has >> _CAP_NET_ADMIN & 1:
        cause = f"{who} has no CAP_NET_ADMIN, so it can set neither devices nor routes nor firewall rules"
        remedy = "run it as root; in a pod: securityContext.capabilities.add: [NET_ADMIN, NET_RAW]"
        found.append(Finding(Severity.ERROR, "CAP_NET_ADMIN", cause, remedy))
    if not has >> _CAP_NET_RAW & 1:
        cause = f"{who} has no CAP_NET_RAW, without which legacy iptables can do nothing"
        remedy = "in a pod: securityContext.capabilities.add: [NET_ADMIN, NET_RAW]"
        found.append(Finding(Severity.WARNING, "CAP_NET_RAW", cause, remedy))
    return found


async def cgroup_limits(facts: Facts) -> list[Finding]:
    if facts.daemon_pid is None:
        raise NotHereError("no daemon runs, or its process cannot be seen from here")
    datapath = None if facts.document is None else facts.document["datapath"]
    workers = None if datapath is None else len(datapath["workers"])
    limits = cgroup.read_limits(Path(f"/proc/{facts.daemon_pid}"))
    return [Finding.of_line(Severity.WARNING, line) for line in cgroup.harm(limits, workers)]


async def forwarding(facts: Facts) -> list[Finding]:
    if not facts.paths:
        raise NotHereError("this host has no path between pods and other hosts yet")
    lines = [line for path in facts.paths for line in await find_forwarding_faults(path)]
    return [Finding.of_line(severity_of(line), line) for line in lines]


async def reverse_path(facts: Facts) -> list[Finding]:
    """IPv6 has no such setting: there packet filters do it."""
    arriving: list[tuple[str, IPAddress]] = []
    for peer in sample(facts.peers).chosen:
        if device := facts.device(Family(peer.subnet.version)):
            arriving += [(facts.underlay, peer.public_ip), (device, peer.inner)]
    strict = {link for link, _ in arriving if link and _rp_filter(link) == _STRICT}
    asked = dict.fromkeys((link, ip) for link, ip in arriving if link in strict and isinstance(ip, IPv4Address))
    if not asked:
        return []
    async with Netlink() as kernel:
        routes = await kernel.routes_to({ip for _, ip in asked})
    found: dict[tuple[str, str], list[IPAddress]] = {}
    for link, ip in asked:
        route = routes.get(ip)
        back = "" if route is None else facts.link_name(route.oif)
        if back not in (link, "lo"):
            found.setdefault((link, back), []).append(ip)
    return [
        Finding(
            Severity.ERROR,
            link,
            f"rp_filter of {link} is strict, and the route to {ips[0]}{_more(len(ips))} leads "
            f"{f'through {back}' if back else 'nowhere'}: the kernel drops what comes from there by {link}",
            # With slashes: a link's name may have a dot.
            f"`sysctl -w net/ipv4/conf/{link}/rp_filter=2` (of `all` and of the link the greater number counts), or "
            f"mend the route: `ip route get {ips[0]}`",
        )
        for (link, back), ips in found.items()
    ]


def _rp_filter(link: str) -> str:
    values = [read_sysctl(f"net/ipv4/conf/{it}/rp_filter") or "0" for it in ("all", link)]
    return max(values)


def _more(count: int) -> str:
    return f" (and to {count - 1} more)" if count > 1 else ""


async def bridge_netfilter(facts: Facts) -> list[Finding]:
    """Kubernetes' services need it: packets of one pod to another on the same bridge pass no rules otherwise."""
    if not facts.is_kube:
        raise NotHereError("only Kubernetes needs it")
    found = []
    for path in facts.paths:
        setting = f"bridge-nf-call-{'iptables' if path.family is Family.IPV4 else 'ip6tables'}"
        value = read_sysctl(f"net/bridge/{setting}")
        if value == "1":
            continue
        cause = (
            f"net.bridge.{setting} is {value or 'missing'}, so pods of one host do not reach services by {path.family}"
        )
        remedy = f"`modprobe br_netfilter`, `sysctl -w net.bridge.{setting}=1`, and have /etc keep both"
        found.append(Finding(Severity.WARNING, f"net.bridge.{setting}", cause, remedy))
    return found


async def kernel_version(facts: Facts) -> list[Finding]:
    if not facts.has_datapath:
        raise NotHereError(f"Backend.Type {facts.backend_type} does not use what is known to be wrong")
    bad = names(corrupted_by(facts.release))
    if not bad:
        return []
    used = [] if facts.document is None else [it for it in bad if it in facts.document["backend"].get("offloads", ())]
    if used:
        cause = f"Linux {facts.release} corrupts what {', '.join(used)} sends, and the datapath uses it"
        remedy = f"restart the daemon, or give it --offload-disabled={','.join(used)}; run another kernel"
        return [Finding(Severity.ERROR, facts.release, cause, remedy)]
    cause = (
        f"Linux {facts.release} is known to corrupt what {', '.join(bad)} sends, so the datapath does without: slower"
    )
    return [Finding(Severity.NOTE, facts.release, cause, "a later kernel of the same series has it mended")]


async def clock(facts: Facts) -> list[Finding]:
    if facts.now_s < _EARLIEST_S:
        cause = "the clock of this host stands before 2025, so certificates and leases count as of another time"
        return [Finding(Severity.ERROR, "", cause, "set it: `timedatectl set-ntp true`, or chrony or ntpd")]
    return [*_lease_times(facts), *_lack_of_ntp(facts)]


def _lack_of_ntp(facts: Facts) -> Iterator[Finding]:
    """It matters where a server judges certificates and ends leases by its own clock."""
    if facts.options.store.kind not in (StoreKind.ETCD, StoreKind.KUBE):
        return
    try:
        if is_clock_synchronised():
            return
    except OSError:
        # A container's filter of system calls may refuse the question.
        return
    what = "certificates and tokens of Kubernetes" if facts.is_kube else "certificates and leases of etcd"
    cause = f"nothing tells the kernel that this host's clock is right (no NTP), and {what} count by clocks"
    remedy = (
        "run chrony, ntpd or systemd-timesyncd (`timedatectl set-ntp true`); where the hypervisor keeps the clock, or "
        "`date -u` is right on all hosts, nothing has to be done"
    )
    yield Finding(Severity.NOTE, "", cause, remedy)


def _lease_times(facts: Facts) -> Iterator[Finding]:
    expires_s = None if facts.document is None else facts.document["lease"]["expires_at"]
    if expires_s is None:
        return
    left_s = expires_s - facts.now_s
    remedy = "compare `date` with that of other hosts, and keep the clocks by NTP (`timedatectl`, `chronyc tracking`)"
    if left_s < -_CLOCK_S:
        cause = f"our lease has expired {-left_s / 60:.0f} min ago by this host's clock: it is ahead, or nobody renews"
        yield Finding(Severity.WARNING, "", cause, remedy)
    elif left_s > LEASE_TTL_S + _CLOCK_S:
        cause = f"our lease expires in {left_s / 3600:.0f} h, and leases last 24: the clock of this host is behind"
        yield Finding(Severity.WARNING, "", cause, remedy)


async def underlay_interface(facts: Facts) -> list[Finding]:
    if facts.document is None:
        raise NotHereError("no daemon says which interface it is")
    link = next((it for it in facts.links.values() if it.name == facts.underlay), None)
    if link is None:
        if facts.blind:
            raise NotHereError(facts.blind)
        cause, remedy = f"the interface {facts.underlay} is gone", "bring it back, or name another one with --iface"
    elif not link.is_up:
        cause, remedy = f"the interface {link.name} is down", f"`ip link set {link.name} up`"
    elif not link.has_carrier:
        cause, remedy = f"the interface {link.name} has no carrier", "look at cable, switch port or the virtual network"
    else:
        return []
    return [Finding(Severity.ERROR, facts.underlay, f"{cause}, so nothing passes to other hosts", remedy)]


async def ipv6_in_kernel(facts: Facts) -> list[Finding]:
    """A running daemon says under `problems` that the kernel has none."""
    if facts.conf is None or Family.IPV6 not in facts.conf.families:
        raise NotHereError("IPv6 is not enabled")
    if read_sysctl("net/ipv6/conf/all/disable_ipv6") is None:
        cause = "IPv6 is enabled in the network config, and this kernel has none"
        return [Finding(Severity.ERROR, "", cause, "boot it without ipv6.disable=1")]
    # A link that has IPv6 switched off has lost its address of IPv6: it is known by that of IPv4.
    links = {link for path in facts.paths for link in await find_pod_links(path)}
    return [
        Finding(
            Severity.WARNING,
            link,
            f"net/ipv6/conf/{link}/disable_ipv6 is 1, so the pods behind {link} have no IPv6",
            f"`sysctl -w net/ipv6/conf/{link}/disable_ipv6=0`, and make the pods anew: {link} has lost its address",
        )
        for link in sorted(links)
        if read_sysctl(f"net/ipv6/conf/{link}/disable_ipv6") == "1"
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

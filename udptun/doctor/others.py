"""What else is on this host and may get in our way: daemons, devices, routes, addresses, network managers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from udptun.backends.udp import UdpKeys
from udptun.config.flags import parse_daemon_flags
from udptun.core.errors import UdptunError
from udptun.core.family import Family
from udptun.core.ip_text import ip_network
from udptun.core.lease import is_inside, overlap
from udptun.core.network_state import (
    DEVICE_NAME,
    ROUTE_PROTOCOL,
    Address,
    IPNetwork,
    Link,
    RouteType,
    describe_route,
)
from udptun.core.ownership import is_marked, marked_network
from udptun.doctor.facts import Facts
from udptun.doctor.finding import Finding, NotHereError, Severity
from udptun.doctor.processes import Process, daemon_words, environment_of, flanneld_in, holder_of_udp_port, processes
from udptun.kernel.claims import names_held

_SHOWN = 5
"""Routes that are named one by one."""
_COMPARED = 50
"""So many routes of others are compared with all peers."""


async def two_daemons(facts: Facts) -> list[Finding]:
    found = []
    remedy = "stop one of them: two daemons undo each other's devices, routes and rules"
    for process in processes():
        if not process.is_here or process.pid == facts.daemon_pid:
            continue
        if flanneld_in(process.words):
            cause = f"flanneld runs here too (pid {process.pid})"
            found.append(Finding(Severity.ERROR, f"pid {process.pid}", cause, remedy))
        elif facts.daemon_pid is not None and _has_our_run_dir(process, facts):
            cause = f"another udptun daemon (pid {process.pid}) has the same --run-dir {facts.options.run_dir}"
            found.append(
                Finding(Severity.WARNING, f"pid {process.pid}", cause, "stop it, or give it directories of its own")
            )
    return found


def _has_our_run_dir(process: Process, facts: Facts) -> bool:
    said = daemon_words(process.words)
    if said is None:
        return False
    with suppress(UdptunError):
        options = parse_daemon_flags(said[1], environment_of(process.pid), as_flanneld=said[0])
        return options.run_dir == facts.options.run_dir
    return False


async def tunnel_port(facts: Facts) -> list[Finding]:
    """A running daemon has its port, or says under `problems` that it has not."""
    if facts.document is not None:
        raise NotHereError("the daemon has its port, or says what is wrong")
    if facts.conf is None or not isinstance(facts.conf.backend, UdpKeys):
        raise NotHereError("only Backend.Type udp has a port of its own")
    port = facts.options.port or facts.conf.backend.port
    is_held, holder = holder_of_udp_port(port)
    if not is_held or (holder is not None and _is_ours(holder, facts)):
        return []
    who = "a program that cannot be seen from here" if holder is None else f"{holder.name} (pid {holder.pid})"
    cause = f"UDP port {port} belongs to {who}, so the daemon cannot start"
    return [
        Finding(Severity.ERROR, f"UDP {port}", cause, "stop it (`ss -ulpn`), or give all hosts another Backend.Port")
    ]


def _is_ours(holder: Process, facts: Facts) -> bool:
    """Whether it is the datapath, or the daemon, which may be there and not answer."""
    return any("udptun/datapath/worker" in it for it in holder.words) or _has_our_run_dir(holder, facts)


async def leftover_devices(facts: Facts) -> list[Finding]:
    _need_kernel(facts)
    if not facts.networks:
        raise NotHereError("the Network is not known")
    running = [*facts.networks, *_networks_held()]
    ours = {facts.device(family) for family in Family}
    found = []
    for link in facts.links.values():
        network = marked_network(link)
        if network is not None and network not in running:
            cause = f"{link.name} was left by the udptun daemon of {network}, and none runs with it"
            remedy = f"`udptun cleanup` with that daemon's flags, or `ip link delete {link.name}`"
        elif DEVICE_NAME.fullmatch(link.name) and link.name not in ours and not is_marked(link):
            cause = f"{link.name} is a device as flannel makes them, and not ours: flannel has left it"
            remedy = f"if no flanneld runs here any more, `ip link delete {link.name}`"
        else:
            continue
        found.append(Finding(Severity.WARNING, link.name, cause, remedy))
    return found


def _networks_held() -> Iterator[IPNetwork]:
    for name in names_held("network"):
        with suppress(ValueError):
            yield ip_network(name)


async def leftover_routes(facts: Facts) -> list[Finding]:
    _need_kernel(facts)
    if not facts.networks:
        raise NotHereError("the Network is not known")
    running = [*facts.networks, *_networks_held()]
    left = [
        it
        for it in facts.routes
        if it.protocol == ROUTE_PROTOCOL and not any(is_inside(it.dst, network) for network in running)
    ]
    names = _names(facts)
    return [
        Finding(
            Severity.WARNING,
            str(route.dst),
            f"the route {describe_route(route, names)} was left by a udptun daemon that does not run",
            f"`udptun cleanup` with that daemon's flags, or `ip route delete {describe_route(route, names)}`",
        )
        for route in left[:_SHOWN]
    ]


async def foreign_routes(facts: Facts) -> list[Finding]:
    """Routes of others into Network, which take packets from the tunnel."""
    _need_kernel(facts)
    if not facts.networks:
        raise NotHereError("the Network is not known")
    ours = {facts.device(family) for family in Family}
    pods = [(it.link_index, ip_network(f"{it.ip}/{it.prefixlen}", strict=False)) for it in facts.addresses]
    names = _names(facts)
    found: list[Finding] = []
    for route in facts.routes:
        if route.protocol == ROUTE_PROTOCOL or not any(is_inside(route.dst, it) for it in facts.networks):
            continue
        if facts.link_name(route.oif) in ours or any(is_inside(route.dst, it) for it in facts.own_subnets):
            continue
        if (route.oif, route.dst) in pods or route.type not in (RouteType.UNICAST, *_REFUSING):
            # Of an address: `overlap` says so.
            continue
        # A host that has thousands of them has one cause for all.
        peers = facts.peers if len(found) < _COMPARED else ()
        taken = next((peer for peer in peers if overlap(peer.subnet, route.dst)), None)
        whose = f"packets to pods of {taken}" if taken else "packets to what other hosts may lease"
        found.append(
            Finding(
                Severity.ERROR if taken else Severity.WARNING,
                str(route.dst),
                f"the route {describe_route(route, names)} is not ours and takes {whose} past the tunnel",
                f"`ip route delete {describe_route(route, names)}`; its owner, such as a VPN, must not set it again",
            )
        )
    return sorted(found, key=lambda it: -it.severity)[:_SHOWN]


_REFUSING = (RouteType.BLACKHOLE, RouteType.UNREACHABLE, RouteType.PROHIBIT)


async def overlapping_networks(facts: Facts) -> list[Finding]:
    """Addresses of this host in Network: of a bridge with the subnet of an earlier lease, of a VPN, of Docker."""
    _need_kernel(facts)
    if not facts.networks:
        raise NotHereError("the Network is not known")
    ours = {facts.device(family) for family in Family}
    found = []
    for address in facts.addresses:
        link = facts.links.get(address.link_index)
        if link is None or link.name in ours or any(address.ip in it for it in facts.own_subnets):
            continue
        network = next((it for it in _claimed(facts) if address.ip in it), None)
        if network is not None and facts.own_subnets:
            found.append(_of_address(address, link, network))
    return found


def _claimed(facts: Facts) -> Sequence[IPNetwork]:
    """What hosts lease.  With vxlan and host-gw the hosts' own addresses may lie in Network outside of it."""
    if facts.conf is None or facts.backend_type == "udp":
        return facts.networks
    return [it for family in facts.conf.families for it in facts.conf.pool(family).leasable]


def _of_address(address: Address, link: Link, network: IPNetwork) -> Finding:
    if link.kind == "bridge":
        cause = (
            f"the bridge {link.name} has {address.ip}/{address.prefixlen}, which is not of this host's subnet any more"
        )
        remedy = f"drain the host, `ip link delete {link.name}`, and start its pods again: the plugin makes it anew"
    else:
        cause = f"{link.name} has {address.ip}, an address in {network}, where the other hosts' pods are"
        remedy = "choose another Network, or another address for that link: packets go to one of the two"
    return Finding(Severity.ERROR, link.name, cause, remedy)


_NETWORKD_DIRS = tuple(Path(it) / "systemd/network" for it in ("/etc", "/run", "/usr/lib", "/lib"))
_NM_DIRS = tuple(Path(it) / "NetworkManager" for it in ("/etc", "/run", "/usr/lib"))
_DHCPCD_CONF = Path("/etc/dhcpcd.conf")


async def network_managers(facts: Facts) -> list[Finding]:
    """Programs that configure every interface they see, unless they are told to leave ours alone."""
    running = {it.name for it in processes() if it.is_here}
    device = facts.device(Family.IPV4) or facts.device(Family.IPV6) or "flannel0"
    found = []
    if "dhcpcd" in running and "flannel" not in _text([_DHCPCD_CONF]):
        cause = f"dhcpcd runs and may give {device} an address and a default route"
        remedy = "`denyinterfaces flannel* cni* veth*` in /etc/dhcpcd.conf, and restart it"
        found.append(Finding(Severity.WARNING, "dhcpcd", cause, remedy))
    if "systemd-network" in running and (file := _networkd_file_for_all()):
        cause = f"systemd-networkd runs, and {file} is for every interface, {device} among them"
        remedy = (
            "write a file that comes before it by name, such as /etc/systemd/network/05-flannel.network, with "
            "`[Match]` `Name=flannel* cni* veth*` and `[Link]` `Unmanaged=yes`; then `networkctl reload`"
        )
        found.append(Finding(Severity.WARNING, str(file), cause, remedy))
    if "NetworkManager" in running and "flannel" not in _text([it for d in _NM_DIRS for it in d.glob("**/*.conf")]):
        cause = f"NetworkManager runs, and no file of it leaves {device} alone"
        remedy = (
            "write /etc/NetworkManager/conf.d/flannel.conf with `[keyfile]` and "
            "`unmanaged-devices=interface-name:flannel*;interface-name:cni*;interface-name:veth*`; then "
            "`systemctl reload NetworkManager`"
        )
        found.append(Finding(Severity.NOTE, "NetworkManager", cause, remedy))
    return found


def _networkd_file_for_all() -> Path | None:
    """The first .network file that matches every interface; networkd takes the first file that fits, by name."""
    files = {it.name: it for directory in reversed(_NETWORKD_DIRS) for it in directory.glob("*.network")}
    for _, file in sorted(files.items()):
        lines = [line.strip() for line in _text([file]).splitlines()]
        names = [word for line in lines if line.startswith("Name=") for word in line[5:].split()]
        if any(name.startswith("flannel") for name in names):
            return None
        others = any(line.startswith(("MACAddress=", "Driver=", "Type=", "Path=", "Kind=")) for line in lines)
        if "*" in names or (not names and not others and "[Match]" in lines):
            return file
    return None


def _text(files: Sequence[Path]) -> str:
    """What the files say but for comments."""
    lines = []
    for file in files:
        with suppress(OSError):
            lines += [
                it for it in file.read_text(errors="replace").splitlines() if not it.lstrip().startswith(("#", ";"))
            ]
    return "\n".join(lines)


def _names(facts: Facts) -> dict[int, str]:
    return {index: link.name for index, link in facts.links.items()}


def _need_kernel(facts: Facts) -> None:
    if facts.blind:
        raise NotHereError(facts.blind)

"""What a host is like: its status, the kernel's state, processes, files, memory.  Times are CLOCK_MONOTONIC seconds."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.soak.ground import Ground, processes, read_status
from bench.soak.store import REAL_TIME
from udptun.control.run_dir import PROBES_FILES
from udptun.lab.host import SUBNET_ENV, Host

_SEPARATOR = "=== soak ==="
SAVED = "last-leases.json"
"""It is written some time after the table has changed."""
_COMMANDS = {
    "links": "ip -j -d link",
    "addresses": "ip -j address",
    "routes": "ip -j route show table all",
    "rules": "ip rule",
    "neighbours": "ip neigh show nud permanent",
    "forwarding entries": "bridge fdb",
    "iptables": "iptables-save",
    "nft": "nft list tables",
    "settings": "cd /proc/sys/net/ipv4; grep -H . ip_forward conf/flannel*/accept_local conf/*/forwarding",
}


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one process.  `memory_mib`: resident and its own, without files and shared memory (RssAnon)."""

    host: str
    role: str
    pid: int
    at_s: float
    memory_mib: float
    n_fds: int


def kernel_state(ground: Ground, host: Host) -> dict[str, list[str]]:
    """Everything that a daemon may set or leave, as lines that are equal whenever the host is equally well.

    Underlay addresses stand in it as the hosts' names, because hosts move.
    """
    script = f"; echo '{_SEPARATOR}'; ".join(_COMMANDS.values())
    parts = host.run([*REAL_TIME, "sh", "-c", script]).stdout.split(f"{_SEPARATOR}\n")
    found = dict(zip(_COMMANDS, parts, strict=True))
    state = {
        "links": [_link(link) for link in json.loads(found.pop("links"))],
        "addresses": [
            f"{link['ifname']} {address['local']}/{address['prefixlen']} {address['scope']}"
            for link in json.loads(found.pop("addresses"))
            for address in link["addr_info"]
            if address["family"] == "inet"
        ],
        "routes": [_route(route) for route in json.loads(found.pop("routes"))],
        # What is known of the peers' paths comes and goes with it.
        "run directory": [it.name for it in host.path("/run/udptun").iterdir() if not PROBES_FILES.fullmatch(it.name)],
        "state directory": [path.name for path in host.path("/var/lib/udptun").iterdir() if path.name != SAVED],
        "subnet.env": host.path(SUBNET_ENV).read_text().splitlines(),
        "processes": [_program(command) for command in processes(host).values()],
        **{name: text.splitlines() for name, text in found.items()},
    }
    names = {str(each.underlay_address): each.name for each in ground.hosts}
    return {name: sorted(filter(None, (comparable(line, names) for line in lines))) for name, lines in state.items()}


def _link(link: Mapping[str, Any]) -> str:
    kind = link.get("linkinfo", {}).get("info_kind", "")
    flags = ",".join(sorted(link["flags"]))
    queues = link.get("linkinfo", {}).get("info_data", {}).get("numqueues", "")
    return f"{link['ifname']} {kind} mtu {link['mtu']} {flags} {queues}"


def _route(route: Mapping[str, Any]) -> str:
    words = [
        f"{key} {route[key]}"
        for key in ("type", "dst", "gateway", "dev", "protocol", "table", "prefsrc")
        if key in route
    ]
    words += [f"{key} {route[key]}" for key in ("metric", "metrics", "flags") if route.get(key)]
    return " ".join(words)


def _program(command: str) -> str:
    """Enough of a command line to tell one program from another."""
    return re.sub(r"(worker\.py|udptun daemon|traffic_end\.py \S+|holder) .*", r"\1", command)


def comparable(line: str, names: Mapping[str, str]) -> str:
    """The line without what differs between two states that are alike.  `names`: underlay address -> host."""
    if line.startswith(("#", ":")):
        # Of iptables-save: the time, and how many packets a chain has seen.
        line = re.sub(r"^#.*|\[\d+:\d+\]", "", line)
    line = re.sub(r"datapath-\w+\.sock", "datapath-*.sock", line)
    return re.sub(r"\b192\.168\.77\.\d+\b", lambda found: names.get(found[0], found[0]), line)


def footprints(host: Host) -> list[Footprint]:
    facts = read_status(host)
    pids = {"daemon": facts["pid"], "datapath": facts["datapath"]["pid"]}
    pids |= {f"standby {n}": pid for n, pid in enumerate(facts["datapath"]["standby_pids"])}
    return [_footprint(host, role.split()[0], pid) for role, pid in pids.items()]


def _footprint(host: Host, role: str, pid: int) -> Footprint:
    status = host.path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    n_fds = len(list(host.path(f"/proc/{pid}/fd").iterdir()))
    return Footprint(host.name, role, pid, time.monotonic(), int(found[1]) / 1024, n_fds)


def kernel_losses(hosts: Sequence[Host], device: str) -> dict[str, int]:
    """What the kernels of the hosts have dropped for want of room, for a person who looks for the cause of a loss."""
    found = {}
    for host in hosts:
        for line in host.run(["nstat", "-asz", "UdpRcvbufErrors", "UdpSndbufErrors"]).stdout.splitlines():
            name, value, *_ = [*line.split(), "", ""]
            if name.startswith("Udp"):
                found[f"{host.name} {name}"] = int(value)
        for name in ("rx_dropped", "tx_dropped"):
            path = host.path(f"/sys/class/net/{device}/statistics/{name}")
            found[f"{host.name} {device} {name}"] = int(path.read_text()) if path.exists() else 0
    return found

"""The paths that are compared, all at once in one lab: from the first pod of h1 to the first pod of h2, and back.

Each path has links of its own in both pods.  So all of them stand side by side from the beginning and cost nothing
while they are idle.  A path that cannot be set up here is left out, with its name and the reason.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path as File
from typing import Protocol, TypeVar

from bench.compiler import SOURCES, compiled, missing_compiler
from bench.figures import (
    FASTD,
    FLANNELD,
    NAIVE,
    OPENVPN,
    PATHS,
    PLAIN,
    PYTUN,
    SHORTCUT,
    TUNNEL,
    UNDERLAY_ONLY,
    VTEP,
    VXLAN,
    by_ipv6,
)
from udptun.core.family import Family
from udptun.core.network_state import IPAddress, IPNetwork
from udptun.datapath.shortcut.programs import find_lack
from udptun.kernel.veth import pair_names
from udptun.lab.comparison import Way, kernel_vxlan, over_device, plain_routing
from udptun.lab.errors import LabError
from udptun.lab.host import UNDERLAY, Host
from udptun.lab.topology import LAB_DIR, Lab

T = TypeVar("T")

_READY_TIMEOUT_S = 15.0
"""For a tunnel program to carry its first ping; fastd's handshake may take several seconds."""

# `ip` says one of these when RTNETLINK answers EOPNOTSUPP, because no module provides the link type.
_NO_SUCH_LINK_TYPE = ("Unknown device type", "Operation not supported")


class End(Protocol):
    """A pod or a host: where a program can be run."""

    def run(
        self, command: Sequence[str], *, check: bool = True, timeout: float = 30, input: str | None = None
    ) -> subprocess.CompletedProcess[str]: ...

    def popen(
        self, command: Sequence[str], *, stdin: int | None = None, stdout: int | None = None, stderr: int | None = None
    ) -> subprocess.Popen[str]: ...


@dataclass(frozen=True, slots=True)
class Process:
    """A process that carries or controls a path's packets; `pid` as in our own PID namespace."""

    host: str
    role: str
    pid: int


@dataclass(frozen=True, slots=True)
class Path:
    """One way from `client` to `server`, which is reached at `address`; `mtu` in bytes."""

    name: str
    mtu: int
    client: End
    server: End
    address: IPAddress
    processes: tuple[Process, ...] = ()
    """Empty where the kernel does it all."""

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self.processes)


@dataclass(frozen=True, slots=True)
class Paths:
    """What can be measured in this lab, and what cannot: name -> reason."""

    present: tuple[Path, ...]
    missing: dict[str, str]


@dataclass(frozen=True, slots=True)
class Tools:
    """What the functions that set paths up need besides the lab.  `directory` is for compiled programs."""

    directory: File
    flanneld: File | None
    """A real flanneld's program, if one was given."""


class _AbsentError(Exception):
    """This path cannot be set up here; the text says why."""


def connect(lab: Lab, keys: Sequence[str] = ("udptun", "host-gw", "vxlan"), tools: Tools | None = None) -> Paths:
    """Set up the paths with these keys of KINDS in a started lab.  Without `tools`, only paths that need no program."""
    present, missing = [], {}
    for key in keys:
        try:
            present.append(KINDS[key](lab, tools))
        except _AbsentError as exc:
            missing[PATHS[key]] = str(exc)
    return Paths(tuple(present), missing)


def interleave(things: Sequence[T], n_rounds: int) -> Iterator[tuple[int, Sequence[T]]]:
    """Number every round from 0 and give it all `things` in an order of its own: each round begins with the next one.

    So a machine that slows down or speeds up meanwhile does it to all alike, and no thing is always first.
    """
    for i in range(n_rounds):
        first = i % len(things)
        yield i, [*things[first:], *things[:first]]


# --- without a program


def _udptun(lab: Lab, _tools: Tools | None, family: Family = Family.IPV4) -> Path:
    """Between the hosts' IPv4 addresses, whatever `family` the pods use."""
    processes = [process for host in lab.hosts for process in daemon_and_datapath(host)]
    client, server = lab.host(1).pod(1), lab.host(2).pod(1)
    address = server.address if family is Family.IPV4 else server.ipv6_address
    assert address is not None
    return Path(_name(TUNNEL, family), lab.host(1).mtu, client, server, address, tuple(processes))


def daemon_and_datapath(host: Host) -> list[Process]:
    """The processes of the host's udptun.

    The datapath outlives the daemon, so it is no child of it.  Its PID namespace and command line identify it.
    """
    assert host.daemon is not None
    found = [Process(host.name, "daemon", host.daemon.pid)]
    own = File(f"/proc/{host.daemon.pid}/ns/pid").readlink()
    for entry in File("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and (entry / "ns/pid").readlink() == own:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if any(word.endswith(b"/datapath/worker.py") for word in words):
                    found.append(Process(host.name, "datapath", int(entry.name)))
    return found


def _underlay(lab: Lab, _tools: Tools | None, family: Family = Family.IPV4) -> Path:
    client, server = lab.host(1), lab.host(2)
    return Path(_name(UNDERLAY_ONLY, family), lab.underlay_mtu, client, server, server.underlay_of(family))


def _plain(lab: Lab, _tools: Tools | None, family: Family = Family.IPV4) -> Path:
    return _along(lab, _name(PLAIN, family), plain_routing(lab, family))


def _vxlan(lab: Lab, _tools: Tools | None, family: Family = Family.IPV4) -> Path:
    try:
        return _along(lab, _name(VXLAN, family), kernel_vxlan(lab, family))
    except LabError as exc:
        if not any(answer in str(exc) for answer in _NO_SUCH_LINK_TYPE):
            raise
        raise _AbsentError("this kernel has no vxlan") from exc


def _vtep(lab: Lab, _tools: Tools | None, family: Family = Family.IPV4) -> Path:
    """The datapath with VXLAN's prefix, on another port and with another VNI than the kernel's VXLAN beside it.

    Each family has a device and a datapath of its own, as in the daemon.
    """
    network: IPNetwork
    if family is Family.IPV4:
        links, network, subnet, overhead = "vtep", IPv4Network("10.247.0.0/16"), "10.247.{}.0/24", 50
    else:
        links, network, subnet, overhead = "vtep-v6", IPv6Network("fd00:247::/48"), "fd00:247:0:{}::/64", 70
    device, mtu = f"tun-{links}", lab.underlay_mtu - overhead

    def command(host: Host, peer: Host) -> list[str]:
        here, there = (str(it.underlay_of(family)) for it in (host, peer))
        subnets = [subnet.format(it.index) for it in (host, peer)]
        return [
            *(sys.executable, str(SOURCES / "peers" / "vtep.py"), str(LAB_DIR / f"{host.name}.{links}"), device),
            *(here, "8572", there, str(network), *subnets, str(mtu)),
        ]

    return _with_workers(_program(lab, _name(VTEP, family), links, network, mtu, device, command))


def _with_workers(path: Path) -> Path:
    """The program starts the processes that carry packets, and is none of them."""
    workers = [Process(it.host, "datapath", pid) for it in path.processes for pid in _children(it.pid)]
    return replace(path, processes=(*path.processes, *workers))


def _children(pid: int) -> list[int]:
    return [int(child) for child in File(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _name(name: str, family: Family) -> str:
    return name if family is Family.IPV4 else by_ipv6(name)


def _shortcut(lab: Lab, _tools: Tools | None) -> Path:
    """The tunnel of Type udp once more, on another port, with the kernel carrying what needs no thought."""
    if why := find_lack():
        raise _AbsentError(why)
    network, mtu, device = IPv4Network("10.246.0.0/16"), lab.underlay_mtu - 28, "tun-short"

    def command(host: Host, peer: Host) -> list[str]:
        subnets = [f"10.246.{it.index}.0/24" for it in (host, peer)]
        return [
            *(sys.executable, str(SOURCES / "peers" / "shortcut.py"), str(LAB_DIR / f"{host.name}.shortcut"), device),
            *(str(host.underlay_address), "8289", str(peer.underlay_address), str(network), *subnets, str(mtu), "eth0"),
        ]

    path = _program(lab, SHORTCUT, "shortcut", network, mtu, device, command)
    near = pair_names(device)[0]
    _wait(
        "the shortcut in both hosts",
        lambda: all(host.path(f"/sys/class/net/{near}").exists() for host in lab.hosts[:2]),
    )
    return _with_workers(path)


def _along(lab: Lab, name: str, way: Way, processes: Sequence[Process] = ()) -> Path:
    client, server = lab.host(1).pod(1), lab.host(2).pod(1)
    return Path(name, way.mtu, client, server, way.address(server), tuple(processes))


# --- tunnel programs, each of which makes a TUN device in both hosts


def _naive(lab: Lab, tools: Tools | None) -> Path:
    assert tools is not None
    if missing := missing_compiler():
        raise _AbsentError(missing)
    program = compiled("peers/naive.c", tools.directory)

    def command(host: Host, peer: Host) -> list[str]:
        return [str(program), "tun-naive", str(host.underlay_address), "8286", str(peer.underlay_address)]

    return _program(lab, NAIVE, "naive", IPv4Network("10.252.0.0/16"), lab.underlay_mtu - 28, "tun-naive", command)


def _pytun(lab: Lab, _tools: Tools | None) -> Path:
    def command(host: Host, peer: Host) -> list[str]:
        script = str(SOURCES / "peers" / "pytun_loop.py")
        return [sys.executable, script, "tun-pytun", str(host.underlay_address), "8287", str(peer.underlay_address)]

    return _program(lab, PYTUN, "pytun", IPv4Network("10.253.0.0/16"), lab.underlay_mtu - 28, "tun-pytun", command)


def _openvpn(lab: Lab, _tools: Tools | None) -> Path:
    """Without keys (openvpn prints three warnings about it).  Its data channel then adds no header of its own."""
    openvpn = _installed("openvpn")
    mtu = lab.underlay_mtu - 28

    def command(host: Host, peer: Host) -> list[str]:
        return [
            *(openvpn, "--dev", "tun-openvpn", "--dev-type", "tun", "--proto", "udp", "--disable-dco"),
            *("--local", str(host.underlay_address), "--lport", "1194", "--remote", str(peer.underlay_address), "1194"),
            *("--cipher", "none", "--auth", "none", "--tun-mtu", str(mtu), "--mssfix", "0", "--txqueuelen", "500"),
        ]

    return _program(lab, OPENVPN, "openvpn", IPv4Network("10.248.0.0/16"), mtu, "tun-openvpn", command)


def _fastd(lab: Lab, _tools: Tools | None) -> Path:
    """With method `null`: no cipher and no authentication of packets.  Only the handshake has both."""
    fastd = _installed("fastd")
    # With that method fastd adds a header of one byte.
    mtu = lab.underlay_mtu - 28 - 1
    keys = {}
    for host in lab.hosts[:2]:
        said = host.run([fastd, "--generate-key"]).stdout
        keys[host.name] = dict(line.lower().split(": ") for line in said.splitlines() if ": " in line)
    for host, peer in _both(lab):
        host.path(LAB_DIR / f"{host.name}.fastd").write_text(
            f'mode tun;\ninterface "tun-fastd";\nmtu {mtu};\nmethod "null";\n'
            f'bind {host.underlay_address}:10000;\nsecret "{keys[host.name]["secret"]}";\n'
            f'peer "other" {{ remote {peer.underlay_address}:10000; key "{keys[peer.name]["public"]}"; }}\n'
        )

    def command(host: Host, peer: Host) -> list[str]:
        return [fastd, "--config", str(LAB_DIR / f"{host.name}.fastd")]

    return _program(lab, FASTD, "fastd", IPv4Network("10.249.0.0/16"), mtu, "tun-fastd", command)


def _flanneld(lab: Lab, tools: Tools | None) -> Path:
    """Type udp, with an etcd on the switch.  flanneld calls its device flannel1, because udptun has flannel0."""
    assert tools is not None
    if tools.flanneld is None:
        raise _AbsentError("give its program with --flanneld")
    etcd, etcdctl = _installed("etcd"), _installed("etcdctl")
    network = IPv4Network("10.254.0.0/16")
    url = f"http://{UNDERLAY[1]}:2379"
    lab.switch.popen(
        [etcd, "--data-dir", str(LAB_DIR / "etcd"), "--listen-client-urls", url, "--advertise-client-urls", url],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    config = f'{{"Network": "{network}", "Backend": {{"Type": "udp", "Port": 8288}}}}'
    put = ["env", "ETCDCTL_API=3", etcdctl, "--endpoints", url, "put", "/coreos.com/network/config", config]
    _wait("etcd to take flannel's configuration", lambda: lab.switch.run(put, check=False).returncode == 0)
    for host in lab.hosts[:2]:
        # flanneld takes the subnet of an earlier run again, so the addresses are known beforehand.
        subnet = f"10.254.{host.index}.1/24"
        host.path(LAB_DIR / f"{host.name}.flanneld").write_text(f"FLANNEL_NETWORK={network}\nFLANNEL_SUBNET={subnet}\n")

    def command(host: Host, peer: Host) -> list[str]:
        file = str(LAB_DIR / f"{host.name}.flanneld")
        return [str(tools.flanneld), "-etcd-endpoints", url, "-iface", "eth0", "-subnet-file", file]

    return _program(lab, FLANNELD, "flanneld", network, lab.underlay_mtu - 28, "flannel1", command)


def _program(
    lab: Lab,
    name: str,
    links: str,
    network: IPNetwork,
    mtu: int,
    device: str,
    command: Callable[[Host, Host], Sequence[str]],
) -> Path:
    """Run `command` in both hosts, connect the pods through the `device` that it makes, and wait until a ping passes.

    What the program prints goes to a log in the lab, whose last line is the reason when it ends or carries nothing.
    """
    children = {}
    for host, peer in _both(lab):
        with _log(host, links).open("w") as log:
            # A session of its own, as udptun's datapath has: the scheduler shares the CPU among sessions first.
            children[host.name] = host.machine.popen(
                command(host, peer),
                stdin=subprocess.DEVNULL,
                stdout=log.fileno(),
                stderr=log.fileno(),
                new_session=True,
            )

    def both_have_the_device() -> bool:
        for host in lab.hosts[:2]:
            if children[host.name].poll() is not None:
                raise _AbsentError(f"its program ended with status {children[host.name].returncode}: {said(host)}")
        return all(host.path(f"/sys/class/net/{device}").exists() for host in lab.hosts[:2])

    def said(host: Host) -> str:
        lines = _log(host, links).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    _wait(f"{device} in both hosts", both_have_the_device)
    way = over_device(lab, links, device, network, mtu)
    processes = [Process(host, "program", child.pid) for host, child in children.items()]
    path = _along(lab, name, way, processes)
    try:
        # Of full size: otherwise an MTU that does not fit would only show later, as a slow path.
        headers = {4: 28, 6: 48}[network.version]
        largest = ["ping", "-c", "1", "-W", "1", "-M", "do", "-s", str(mtu - headers), str(path.address)]
        _wait(f"a ping of {mtu} bytes", lambda: path.client.run(largest, check=False).returncode == 0)
    except _AbsentError as exc:
        raise _AbsentError(f"{exc}; {said(lab.host(1))}") from exc
    return path


def _log(host: Host, program: str) -> File:
    return host.path(LAB_DIR / f"{host.name}.{program}.log")


def _both(lab: Lab) -> tuple[tuple[Host, Host], tuple[Host, Host]]:
    one, two = lab.host(1), lab.host(2)
    return (one, two), (two, one)


def _installed(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise _AbsentError(f"{program} is not installed")
    return found


def _wait(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while not holds():
        if time.monotonic() > deadline:
            raise _AbsentError(f"waited {_READY_TIMEOUT_S:g} s in vain for {what}")
        time.sleep(0.02)


KINDS: Mapping[str, Callable[[Lab, Tools | None], Path]] = {
    "udptun": _udptun,
    "udptun-ipv6": partial(_udptun, family=Family.IPV6),
    "host-gw": _plain,
    "host-gw-ipv6": partial(_plain, family=Family.IPV6),
    "vxlan": _vxlan,
    "vxlan-ipv6": partial(_vxlan, family=Family.IPV6),
    "vtep": _vtep,
    "vtep-ipv6": partial(_vtep, family=Family.IPV6),
    "shortcut": _shortcut,
    "naive": _naive,
    "pytun": _pytun,
    "underlay": _underlay,
    "underlay-ipv6": partial(_underlay, family=Family.IPV6),
    "flanneld": _flanneld,
    "fastd": _fastd,
    "openvpn": _openvpn,
}
"""Word on the command line (figures.PATHS) -> the function that sets the path up."""

"""The lab: hosts on one underlay switch, a daemon in each host, pods behind each host's cni0.

    pod eth0 -- cni0 [h1] eth0 -- h1 \\
                                       underlay (bridge, 192.168.77.1) -- captures, and whatever leaks in clear text
    pod eth0 -- cni0 [h2] eth0 -- h2 /

Everything lives in namespaces and on tmpfs of the lab's own machines.  Nothing has a name outside, and nothing is
written to disk.  When the process that made the `Lab` ends, for whatever reason, all of it is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from ipaddress import IPv4Network, ip_interface
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from udptun.core.family import Family
from udptun.lab.errors import CommandError, LabError
from udptun.lab.host import DISTANT, FIRST_HOST, UNDERLAY, UNDERLAY_IPV6, Host
from udptun.lab.machine import LAB_DIR as LAB_DIR
from udptun.lab.machine import SOURCE_ROOT, Machine, signals_deferred
from udptun.lab.podman import missing_packages

if TYPE_CHECKING:
    from udptun.core.network_state import IPAddress

log = logging.getLogger(__name__)

SWITCH = "underlay"
"""Name of the switch's machine and of its bridge, which holds UNDERLAY's first address, the hosts' gateway."""

NET_CONF = LAB_DIR / "net-conf.json"
LEASES = LAB_DIR / "leases.db"
KUBE_PORT = 6443
"""Where the switch serves Kubernetes' API, with `store` kube."""

DEFAULT_NET_CONF: Mapping[str, object] = {"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}
DUAL_STACK_NET_CONF: Mapping[str, object] = {
    "Network": "10.244.0.0/16",
    "EnableIPv6": True,
    "IPv6Network": "fd00:244::/48",
    "Backend": {"Type": "udp"},
}

REQUIRED_TOOLS = ("ip", "nsenter")

_MAX_HOSTS = 240


class Offload(Enum):
    """What the underlay's links do to large packets, and so what a receiver gets."""

    FULL = "A"
    """As veth is made: super-packets and unfinished checksums cross the underlay whole."""
    NONE = "B"
    """Neither segmentation nor merging: one frame per packet, like a plain NIC without any help."""
    RECEIVE = "C"
    """Like NONE, and the receiving host merges (GRO)."""


_FEATURES = ("tso", "gso", "tx-udp-segmentation", "gro")
_ON = {
    Offload.FULL: {"tso", "gso", "tx-udp-segmentation"},
    Offload.NONE: set[str](),
    Offload.RECEIVE: {"gro"},
}


def missing_requirements(tools: Sequence[str] = REQUIRED_TOOLS) -> list[str]:
    """What this machine and user lack for a lab, each as a short phrase; empty when a lab can run."""
    missing = [] if os.geteuid() == 0 else ["root"]
    missing += [f"the command {tool}" for tool in tools if shutil.which(tool) is None]
    return missing + ([] if Path("/dev/net/tun").exists() else ["/dev/net/tun"])


class Lab:
    """A context manager: entering makes switch and hosts, leaving removes everything.

    `start` then runs a daemon in each host and adds the pods.  `net_conf` is the text of net-conf.json as an object, or
    a file to copy.  `store` is the daemons' --store, where `local` means one database that all hosts share, and `kube`
    an API server in the switch with a node for each host.
    `daemon_command` replaces `udptun daemon`; such a command must say READY=1 on NOTIFY_SOCKET (sd_notify), as flanneld
    does too.  `underlay_mtu` is in bytes.  `ipv6`: the underlay has IPv6 as well, and so have the pods where subnet.env
    names it; without `ipv4` it is alone.  `pod_cidrs`: of which families Kubernetes gives each node a subnet, in that
    order; by default of those of `net_conf`.

    Not for threads: one thread at a time may call it.
    """

    def __init__(
        self,
        name: str = "lab",
        n_hosts: int = 2,
        n_pods: int = 1,
        net_conf: Mapping[str, object] | Path = DEFAULT_NET_CONF,
        store: str = "local",
        underlay_mtu: int = 1500,
        daemon_command: Sequence[str] | None = None,
        cni: bool = False,
        ipv6: bool = False,
        ipv4: bool = True,
        pod_cidrs: Sequence[Family] = (),
    ) -> None:
        if not 1 <= n_hosts <= _MAX_HOSTS:
            raise LabError(f"a lab has 1 to {_MAX_HOSTS} hosts, not {n_hosts}")
        self.name = name
        self.hosts: list[Host] = []
        self.underlay_mtu = underlay_mtu
        self.daemon_command = list(daemon_command) if daemon_command else _udptun_daemon(store, cni, _api_address(ipv4))
        self._has_containers = cni
        self.has_ipv6 = ipv6
        self._has_ipv4 = ipv4
        self._pod_cidrs = pod_cidrs
        self._is_kube = store == "kube"
        self._api: subprocess.Popen[str] | None = None
        self._n_hosts = n_hosts
        self._n_pods = n_pods
        try:
            self._net_conf = net_conf.read_text() if isinstance(net_conf, Path) else json.dumps(net_conf)
        except OSError as exc:
            raise LabError(f"cannot read the network config {net_conf}: {exc.strerror}") from exc
        self._offload = Offload.FULL
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Lab:
        if missing := missing_requirements():
            raise LabError(f"a lab needs {' and '.join(missing)}")
        if self._has_containers and (missing := missing_packages()):
            raise LabError(f"a lab with --cni needs {', '.join(missing)}: apt-get install {' '.join(missing)}")
        with contextlib.ExitStack() as undo:
            with signals_deferred():
                self.switch = Machine(self.name, SWITCH)
                undo.callback(self.switch.down)
            self.switch.wait_made()
            # Written through the namespace: the directory exists on the lab's own tmpfs only.
            self.switch.at().path(NET_CONF).write_text(self._net_conf)
            if self.has_ipv6:
                enable_ipv6(self.switch)
            self.switch.at().ip(
                "link set lo up",
                *self._subnet(SWITCH, UNDERLAY),
                *([f"addr add {UNDERLAY_IPV6[1]}/{UNDERLAY_IPV6.prefixlen} dev {SWITCH} nodad"] * self.has_ipv6),
            )
            undo.callback(self._hosts_down)
            if self._is_kube:
                self._start_api()
                undo.callback(self._stop_api)
            self._add_hosts(self._n_hosts)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _hosts_down(self) -> None:
        for host in self.hosts:
            host.down()

    def host(self, number: int) -> Host:
        """The host by number, from 1."""
        if not 1 <= number <= len(self.hosts):
            raise LabError(f"the lab {self.name} has {len(self.hosts)} hosts, no h{number}")
        return self.hosts[number - 1]

    def start(self, timeout: float = 20) -> None:
        """Start every host's daemon, all at the same time, wait up to `timeout` seconds for each, then add the pods."""
        for host in self.hosts:
            host.start_daemon()
        for host in self.hosts:
            host.wait_ready(timeout)
            env = host.subnet_env()
            gateways = filter(None, map(env.get, ("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET")))
            subnets = " and ".join(str(ip_interface(gateway).network) for gateway in gateways)
            addresses = [host.underlay_address] * self._has_ipv4 + [host.underlay_ipv6] * self.has_ipv6
            log.info("host %s is ready: subnet %s, underlay %s", host.name, subnets, " and ".join(map(str, addresses)))
        for host in self.hosts:
            for _ in range(self._n_pods):
                host.add_pod()

    def add_host(self) -> Host:
        """One more host on the underlay, without daemon and pods."""
        self._add_hosts(1)
        return self.hosts[-1]

    def _add_hosts(self, count: int) -> None:
        # The slow part, starting the holders' interpreters, runs side by side.
        new: list[Host] = []
        for _ in range(count):
            index = len(self.hosts) + 1
            if index > _MAX_HOSTS:
                raise LabError(f"a lab has at most {_MAX_HOSTS} hosts")
            with signals_deferred():
                self.hosts.append(Host(self, index, Machine(self.name, f"h{index}", self.switch)))
            new.append(self.hosts[-1])
        for host in new:
            host.machine.wait_made()
            if self.has_ipv6:
                enable_ipv6(host.machine)
            self.switch.at().ip(
                f"link add {host.name} mtu {self.underlay_mtu} type veth"
                f" peer name eth0 mtu {self.underlay_mtu} netns {host.machine.at().net_ns}",
                f"link set {host.name} master {SWITCH} up",
            )
            host.machine.at().ip("link set lo up", "link set eth0 up")
            if self._has_ipv4:
                host.machine.at().ip(
                    f"addr add {host.underlay_address}/{UNDERLAY.prefixlen} brd + dev eth0",
                    f"route add default via {UNDERLAY[1]}",
                )
            if self.has_ipv6:
                host.machine.at().ip(
                    f"addr add {host.underlay_ipv6}/{UNDERLAY_IPV6.prefixlen} dev eth0 nodad",
                    f"route add default via {UNDERLAY_IPV6[1]}",
                )
            if self._offload is not Offload.FULL:
                self._set_offload(host)
            self._register(host)
            if self._has_containers:
                host.prepare_containers()
        log.info("underlay %s connects %s", UNDERLAY, ", ".join(host.name for host in new))

    def _start_api(self) -> None:
        """Run the API server at the switch, and wait until it serves."""
        with (self.switch.at().path(LAB_DIR) / "kube-api.log").open("a") as output:
            self._api = self.switch.popen(
                [sys.executable, "-m", "udptun.lab.kube_api", str(_api_address(self._has_ipv4)), str(KUBE_PORT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT)},
                new_session=True,
            )
        self._hear_api("ready")

    def _hear_api(self, wanted: str) -> None:
        assert self._api is not None
        assert self._api.stdout is not None
        if self._api.stdout.readline() != f"{wanted}\n":
            said = (self.switch.at().path(LAB_DIR) / "kube-api.log").read_text().strip().splitlines()
            raise LabError(
                f"the lab's API server ended: {said[-1] if said else 'it printed nothing'}; "
                "does it have its libraries? pip install 'udptun[kube]'"
            )

    def _register(self, host: Host) -> None:
        """Make the host a node with the podCIDRs of its number."""
        if self._api is None:
            return
        # Here, because most commands of a lab do not need it: it would be a third of their start.
        from udptun.backends.choice import parse_net_conf

        assert self._api.stdin is not None
        conf = parse_net_conf(self._net_conf, "the lab's net-conf.json")
        pools = [conf.pool(family) for family in self._pod_cidrs or conf.families]
        subnets = (f"{it.subnet_min + (host.index - 1) * it.subnet_size}/{it.subnet_len}" for it in pools)
        self._api.stdin.write(f"{host.name} {','.join(subnets)}\n")
        self._api.stdin.flush()
        self._hear_api(host.name)

    def _stop_api(self) -> None:
        if self._api is not None:
            self._api.kill()
            self._api.communicate()

    def relocate(self, host: Host, network: IPv4Network) -> None:
        """Put the host on `network`, UNDERLAY or DISTANT, with its number as its address there."""
        bridge = f"{SWITCH}2" if network == DISTANT else SWITCH
        switch = self.switch.at()
        if not switch.path(f"/sys/class/net/{bridge}").exists():
            switch.ip(*self._subnet(bridge, network))
            self.switch.run(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])
        switch.ip(f"link set {host.name} master {bridge}")
        host.move(network[FIRST_HOST + host.index])

    def _subnet(self, bridge: str, network: IPv4Network) -> list[str]:
        """The `ip` commands that make the bridge of an underlay subnet.

        The bridge has a MAC of its own.  Otherwise it would have the lowest MAC of its ports, which changes when a port
        goes; hosts that remember the old one would lose their gateway.
        """
        mac = f"02:{network[1].packed.hex(':')}:00"
        return [
            f"link add {bridge} mtu {self.underlay_mtu} address {mac} type bridge forward_delay 0 mcast_snooping 0",
            f"addr add {network[1]}/{network.prefixlen} dev {bridge}",
            f"link set {bridge} up",
        ]

    def set_offload(self, mode: Offload) -> None:
        """Switch the links of the underlay, both ends, to `mode`; hosts added later get it too.  Needs ethtool."""
        self._offload = mode
        for host in self.hosts:
            if host.machine.is_up:
                self._set_offload(host)

    def _set_offload(self, host: Host) -> None:
        on = _ON[self._offload]
        at_host = [word for name in _FEATURES for word in (name, "on" if name in on else "off")]
        # GRO is the receiving host's; the switch would merge what it should only pass on.
        at_switch = [word for name in _FEATURES for word in (name, "on" if name in on - {"gro"} else "off")]
        host.run(["ethtool", "-K", "eth0", *at_host])
        self.switch.run(["ethtool", "-K", host.name, *at_switch])

    @contextlib.contextmanager
    def capture(self, path: Path, expression: str = "") -> Iterator[Path]:
        """Record into the pcap file `path` every frame that crosses the underlay in the block and fits `expression`.

        The file is written packet by packet: a reader inside the block waits for what it expects.  Needs tcpdump.
        """
        options = ["-i", SWITCH, "-n", "-U", "--immediate-mode", "-Z", "root", "-w", str(path)]
        command = ["tcpdump", *options, *expression.split()]
        tcpdump = self.switch.popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert tcpdump.stderr is not None
        with tcpdump:
            said = [tcpdump.stderr.readline()]
            while said[-1] and "listening on" not in said[-1]:
                said.append(tcpdump.stderr.readline())
            if not said[-1]:
                raise CommandError(SWITCH, subprocess.CompletedProcess(command, tcpdump.wait(), "", "".join(said)))
            try:
                yield path
            finally:
                tcpdump.send_signal(signal.SIGINT)


def enable_ipv6(machine: Machine) -> None:
    """Give the machine IPv6, which it is made without: tests see on the underlay only what they send.

    Its addresses can be used at once, without a second of duplicate address detection.
    """
    settings = (("all/disable_ipv6", 0), ("default/disable_ipv6", 0), ("default/accept_dad", 0), ("all/forwarding", 1))
    lines = "; ".join(f"echo {value} > /proc/sys/net/ipv6/conf/{name}" for name, value in settings)
    machine.run(["sh", "-c", lines])


def _api_address(has_ipv4: bool) -> IPAddress:
    return UNDERLAY[1] if has_ipv4 else UNDERLAY_IPV6[1]


def _udptun_daemon(store: str, cni: bool, api: IPAddress) -> list[str]:
    where = f"[{api}]" if api.version == 6 else str(api)
    more = [f"--kube-api-url=http://{where}:{KUBE_PORT}"] if store == "kube" else []
    more += ["--ip-masq"] if cni else []
    return [
        *(sys.executable, "-m", "udptun", "daemon"),
        *("--store", f"local:{LEASES}" if store == "local" else store),
        *more,
        *("--net-config-path", str(NET_CONF)),
    ]

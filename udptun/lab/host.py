"""A host of the lab and its pods: commands, the daemon, what the daemon says about the network, faults."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path
from typing import TYPE_CHECKING

from udptun.core.family import Family
from udptun.lab.errors import LabError
from udptun.lab.machine import LAB_DIR, SOURCE_ROOT, File, Machine
from udptun.lab.podman import Podman

if TYPE_CHECKING:
    from udptun.core.network_state import IPAddress
    from udptun.lab.topology import Lab

log = logging.getLogger(__name__)

UNDERLAY = IPv4Network("192.168.77.0/24")
DISTANT = IPv4Network("192.168.78.0/24")
"""A second underlay subnet, behind a router (the switch's machine), for hosts that `Lab.relocate` puts there."""
UNDERLAY_IPV6 = IPv6Network("fd00:77::/64")
"""Beside UNDERLAY, in a lab with IPv6."""
FIRST_HOST = 10
"""Host 1 has the address after this one in its underlay subnet."""

SUBNET_ENV = "/run/flannel/subnet.env"


class Pod:
    """A network namespace of a host, with eth0 behind the host's cni0; a container's, if the host has containers."""

    def __init__(self, host: Host, number: int, address: IPAddress, ipv6_address: IPv6Address | None = None) -> None:
        """`address` is that of IPv4.  In a pod without IPv4 it is `ipv6_address`."""
        self.host = host
        self.number = number
        self.name = f"p{number}"
        self.address = address
        self.ipv6_address = ipv6_address

    def __str__(self) -> str:
        return f"{self.host.name}/{self.name}"

    def run(
        self, command: Sequence[str], *, check: bool = True, timeout: float = 30, input: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """See `Machine.run`."""
        return self.host.machine.run(command, pod=self.name, check=check, timeout=timeout, input=input)

    def popen(
        self, command: Sequence[str], *, stdin: File = None, stdout: File = None, stderr: File = None
    ) -> subprocess.Popen[str]:
        """See `Machine.popen`."""
        return self.host.machine.popen(command, pod=self.name, stdin=stdin, stdout=stdout, stderr=stderr)

    def ip(self, *lines: str) -> None:
        """See `Place.ip`."""
        self.host.machine.at(self.name).ip(*lines)


class Host:
    """A machine on the underlay.  `Lab` makes them."""

    def __init__(self, lab: Lab, index: int, machine: Machine) -> None:
        self.lab = lab
        self.index = index
        self.machine = machine
        self.underlay_address = UNDERLAY[FIRST_HOST + index]
        self.underlay_ipv6 = UNDERLAY_IPV6[FIRST_HOST + index]
        self.pods: list[Pod] = []
        self._podman: Podman | None = None
        self._daemon: subprocess.Popen[str] | None = None
        self._notify: socket.socket | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        return self.machine.name

    def underlay_of(self, family: Family) -> IPAddress:
        """The host's address on the underlay, of that family."""
        return self.underlay_address if family is Family.IPV4 else self.underlay_ipv6

    # --- commands

    def run(
        self, command: Sequence[str], *, check: bool = True, timeout: float = 30, input: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """See `Machine.run`."""
        return self.machine.run(command, check=check, timeout=timeout, input=input)

    def popen(
        self, command: Sequence[str], *, stdin: File = None, stdout: File = None, stderr: File = None
    ) -> subprocess.Popen[str]:
        """See `Machine.popen`."""
        return self.machine.popen(command, stdin=stdin, stdout=stdout, stderr=stderr)

    def path(self, inside: str | Path) -> Path:
        """The host's own file `inside` (absolute) as a path of ours, while the host is up."""
        return self.machine.at().path(inside)

    # --- daemon

    @property
    def daemon(self) -> subprocess.Popen[str] | None:
        """The daemon's process once it was started, dead or alive."""
        return self._daemon

    def start_daemon(self, extra_args: Sequence[str] = (), command: Sequence[str] | None = None) -> None:
        """Start the daemon (`command` instead of the lab's) and return at once; `wait_ready` waits for it.

        It gets a session of its own, NOTIFY_SOCKET, and NODE_NAME as a pod of Kubernetes has it.  What it prints is
        appended to its log.
        """
        if self._daemon is not None and self._daemon.poll() is None:
            raise LabError(f"the daemon of {self.name} is running already (pid {self._daemon.pid})")
        if self._notify is not None:
            self._notify.close()
        notify = LAB_DIR / f"{self.name}.notify"
        self.path(notify).unlink(missing_ok=True)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._notify.bind(str(self.path(notify)))
        # The package must be found from any working directory, installed or not.
        python_path = os.pathsep.join(filter(None, [str(SOURCE_ROOT), os.environ.get("PYTHONPATH")]))
        with self._log_path.open("a") as output:
            self._daemon = self.machine.popen(
                [*(self.lab.daemon_command if command is None else command), *extra_args],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={
                    **os.environ,
                    "NOTIFY_SOCKET": str(notify),
                    "NODE_NAME": self.name,
                    "PYTHONPATH": python_path,
                },
                new_session=True,
            )

    def leave_daemon(self) -> subprocess.Popen[str]:
        """Hand the running daemon over to the caller: the next `start_daemon` starts another one beside it."""
        if self._daemon is None:
            raise LabError(f"the daemon of {self.name} has not been started")
        daemon, self._daemon = self._daemon, None
        return daemon

    def wait_ready(self, timeout: float = 10) -> None:
        """Wait until the daemon says READY=1, which it does when its subnet.env is written.

        After a SIGHUP: until it says so once more.  Raises LabError with the end of its log when it ends, or isn't
        ready after `timeout` seconds.
        """
        if self._daemon is None or self._notify is None:
            raise LabError(f"the daemon of {self.name} has not been started")
        deadline = time.monotonic() + timeout
        # The process is our child and not waited for, so its pid is its own.
        pid_fd = os.pidfd_open(self._daemon.pid) if self._daemon.poll() is None else None
        try:
            events = select.poll()
            events.register(self._notify, select.POLLIN)
            if pid_fd is not None:
                events.register(pid_fd, select.POLLIN)
            while True:
                with contextlib.suppress(BlockingIOError):
                    while message := self._notify.recv(4096, socket.MSG_DONTWAIT):
                        if b"READY=1" in message.split(b"\n"):
                            return
                if (status := self._daemon.poll()) is not None:
                    raise LabError(f"the daemon of {self.name} ended with status {status}: {self._log_end()}")
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise LabError(
                        f"the daemon of {self.name} did not say READY=1 within {timeout:g} s: {self._log_end()}"
                    )
                events.poll(left_s * 1000)
        finally:
            if pid_fd is not None:
                os.close(pid_fd)

    def stop_daemon(self, number: signal.Signals = signal.SIGTERM, timeout: float = 10) -> int:
        """Send the signal, wait for the end, return the status (-N after signal N, as subprocess has it).

        What the daemon started and left running goes on.
        """
        if self._daemon is None:
            raise LabError(f"the daemon of {self.name} has not been started")
        self._daemon.send_signal(number)
        try:
            return self._daemon.wait(timeout)
        except subprocess.TimeoutExpired as exc:
            raise LabError(
                f"the daemon of {self.name} is alive {timeout:g} s after {number.name}: {self._log_end()}"
            ) from exc

    def daemon_log(self) -> str:
        """All that the host's daemons have printed so far."""
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    @property
    def _log_path(self) -> Path:
        return self.path(LAB_DIR / f"{self.name}.log")

    def _log_end(self) -> str:
        return " / ".join(self.daemon_log().splitlines()[-5:]) or "it printed nothing"

    # --- what the daemon says about the network

    def subnet_env(self) -> dict[str, str]:
        """The host's subnet.env.  Raises LabError when there is none."""
        try:
            text = self.path(SUBNET_ENV).read_text()
        except FileNotFoundError as exc:
            raise LabError(f"{self.name} has no {SUBNET_ENV}: its daemon is not ready") from exc
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    @property
    def gateway(self) -> IPv4Interface:
        """FLANNEL_SUBNET: the address of cni0, with the subnet's prefix length.  Raises LabError without IPv4."""
        if (text := self.subnet_env().get("FLANNEL_SUBNET")) is None:
            raise LabError(f"{self.name} has no IPv4 subnet")
        return IPv4Interface(text)

    @property
    def ipv6_gateway(self) -> IPv6Interface | None:
        """FLANNEL_IPV6_SUBNET, the same of IPv6; None without it."""
        text = self.subnet_env().get("FLANNEL_IPV6_SUBNET")
        return None if text is None else IPv6Interface(text)

    @property
    def subnet(self) -> IPv4Network:
        return self.gateway.network

    @property
    def mtu(self) -> int:
        """FLANNEL_MTU, bytes."""
        return int(self.subnet_env()["FLANNEL_MTU"])

    # --- pods

    def pod(self, number: int) -> Pod:
        """The host's pod by number, from 1."""
        if not 1 <= number <= len(self.pods):
            raise LabError(f"{self.name} has {len(self.pods)} pods, no p{number}")
        return self.pods[number - 1]

    def prepare_containers(self) -> None:
        """Give the host podman; the pods that are added from now on are containers.  Raises LabError."""
        self._podman = Podman(self.machine)

    def add_pod(self) -> Pod:
        """One more pod, with the subnet.env of this moment."""
        number = len(self.pods) + 1
        pod = self._wire_pod(number) if self._podman is None else self._run_container(self._podman, number)
        self.pods.append(pod)
        addresses = dict.fromkeys(filter(None, (pod.address, pod.ipv6_address)))
        log.info("pod %s has %s", pod, " and ".join(map(str, addresses)))
        return pod

    def _wire_pod(self, number: int) -> Pod:
        """As a CNI plugin would."""
        ipv6_gateway = self.ipv6_gateway
        ipv6_address = None if ipv6_gateway is None else ipv6_gateway.network[1 + number]
        has_ipv4 = ipv6_gateway is None or "FLANNEL_SUBNET" in self.subnet_env()
        gateway = self.gateway if has_ipv4 else None
        address = ipv6_address if gateway is None else gateway.network[1 + number]
        assert address is not None
        pod = Pod(self, number, address, ipv6_address)
        self.run(["ip", "netns", "add", pod.name])
        pod.ip("link set lo up")
        self.attach(pod, "cni0", "eth0", gateway, address, self.mtu)
        if gateway is not None:
            pod.ip(f"route add default via {gateway.ip}")
        if ipv6_gateway is not None:
            length = ipv6_gateway.network.prefixlen
            self.machine.at().ip(f"addr replace {ipv6_gateway} dev cni0 nodad")
            pod.ip(f"addr add {ipv6_address}/{length} dev eth0 nodad", f"route add default via {ipv6_gateway.ip}")
        return pod

    def _run_container(self, podman: Podman, number: int) -> Pod:
        container = podman.run_pod(f"p{number}")
        pod = Pod(self, number, container.address, container.ipv6_address)
        # Whoever enters a pod looks for its network namespace under the pod's name.
        self.path(f"/run/netns/{pod.name}").symlink_to(container.net_ns)
        return pod

    def attach(
        self,
        pod: Pod,
        bridge: str,
        link: str,
        gateway: IPv4Interface | IPv6Interface | None,
        address: IPAddress,
        mtu: int,
    ) -> None:
        """Give `pod` one more link: its end is `link` with `address`, the other end a port of the host's `bridge`.

        The bridge is made with the address `gateway` when it isn't there yet.  Without `gateway` there is no address.
        """
        here = self.machine.at()
        # The kernel wants no broadcast address of IPv6, and the address at once.
        how = "nodad" if address.version == 6 else "brd +"
        if not self.path(f"/sys/class/net/{bridge}").exists():
            here.ip(
                f"link add {bridge} type bridge forward_delay 0",
                *([] if gateway is None else [f"addr add {gateway} dev {bridge} {how}"]),
                f"link set {bridge} up",
            )
        port = f"{bridge[:9]}-{pod.name}"
        here.ip(
            f"link add {port} mtu {mtu} type veth peer name {link} mtu {mtu} netns {self.machine.at(pod.name).net_ns}",
            f"link set {port} master {bridge} up",
        )
        if gateway is not None:
            pod.ip(f"addr add {address}/{gateway.network.prefixlen} dev {link} {how}")
        pod.ip(f"link set {link} up")

    # --- faults

    def down(self) -> None:
        """Power cut: everything in the host dies at once, for good; `Lab.add_host` makes another host."""
        self.machine.down()
        if self._notify is not None:
            self._notify.close()

    def move(self, address: IPv4Address) -> None:
        """Change the host's underlay address; there is no moment without an address."""
        old = self.underlay_address
        network = DISTANT if address in DISTANT else UNDERLAY
        self.machine.at().ip(
            f"addr add {address}/{network.prefixlen} brd + dev eth0",
            f"addr del {old}/{network.prefixlen} dev eth0",
            f"route replace default via {network[1]}",
        )
        self.underlay_address = address

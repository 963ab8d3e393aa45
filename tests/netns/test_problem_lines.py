"""What an operator reads when something is wrong on a host, and how it ends: one row a fault.

    pod h1/p1 -- cni0 - flannel0 [h1] eth0 -- underlay -- eth0 [h2] flannel0 - cni0 -- pod h2/p1

Each fault is done to h1.  Then `udptun status` has one line under `problem`, the log has the same line once, and the
daemon lives.  When the cause is gone the line is gone too, and the pods reach each other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from traffic import CLEANUP, ping, read_status

from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

Act = Callable[[Host], None]

FLAGS = ["--iptables-resync=1"]

ON_NOTICE_S = 10
"""For what the kernel reports, and what `--iptables-resync` finds.  A second or so is promised; the machine may be
busy."""


def shell(*commands: str) -> Act:
    """Run the commands on the host, one after the other."""

    def act(host: Host) -> None:
        for command in commands:
            host.run(["sh", "-c", command])

    return act


@dataclass(frozen=True)
class Fault:
    """`line` is a regular expression for the whole line."""

    name: str
    line: str
    inflict: Act
    heal: Act
    at_start: bool = False
    """The fault is there before the daemon starts."""
    flags: tuple[str, ...] = ()


def read_only_sysctls(path: str, value: int, without: str) -> str:
    return (
        rf"sysctl {path} cannot be set to {value} \(EROFS\), so {without}; run `sysctl -w {path}={value}` on the host, "
        r"or give the container a /proc/sys that it can write"
    )


NOTICE = "ip link set lo mtu 65535; ip link set lo mtu 65536"
"""The kernel says nothing about a changed sysctl; a look that something else brings finds it."""

READ_ONLY = "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys"

FAULTS = [
    # Settings of the kernel.  The device is new, so each one has to be set.
    Fault(
        "/proc/sys read-only",
        read_only_sysctls("net/ipv4/conf/flannel0/accept_local", 1, "this host and its pods are not told of .*"),
        shell(READ_ONLY),
        shell("umount /proc/sys", NOTICE),
        at_start=True,
    ),
    Fault(
        "/proc/sys read-only, IPv6 on",
        read_only_sysctls("net/ipv6/conf/flannel0/disable_ipv6", 1, "the kernel sends IPv6 router solicitations .*"),
        shell(
            "sysctl -qw net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.disable_ipv6=0",
            "sysctl -qw net.ipv4.conf.default.accept_local=1",
            READ_ONLY,
        ),
        shell(
            "umount /proc/sys",
            "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1",
            "sysctl -qw net.ipv4.conf.default.accept_local=0",
            NOTICE,
        ),
        at_start=True,
    ),
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two hosts with a pod each, shared by the rows."""
    with Lab(f"w{os.getpid()}") as lab:
        for host in lab.hosts:
            host.start_daemon(FLAGS)
        for host in lab.hosts:
            host.wait_ready()
            host.add_pod()
        yield lab


def problems(host: Host) -> list[str]:
    found: list[str] = read_status(host)["problems"]
    return found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: re.sub(r"\W+", "_", fault.name))
def test_fault_is_named_until_its_cause_is_gone(lab: Lab, fault: Fault) -> None:
    host = lab.host(1)
    one, two = host.pod(1), lab.host(2).pod(1)
    assert problems(host) == []
    if fault.at_start or fault.flags:
        assert host.stop_daemon() == 0
        host.run(CLEANUP)
    before = len(host.daemon_log())
    if fault.flags and not fault.at_start:
        start(host, fault)
    try:
        fault.inflict(host)
        if fault.at_start:
            start(host, fault)
        wait_until(f"the problem line; there are {problems(host)}", lambda: bool(problems(host)), ON_NOTICE_S)
        (line,) = problems(host)
        assert re.fullmatch(fault.line, line)
        (logged,) = [it for it in host.daemon_log()[before:].splitlines() if line in it]
        assert logged.split(" ", 3)[2] == "W"
    finally:
        fault.heal(host)
    wait_until("the end of the problem", lambda: problems(host) == [], ON_NOTICE_S)
    assert "Traceback" not in host.daemon_log()[before:]
    ping(one, two.address)
    if fault.flags:
        assert host.stop_daemon() == 0
        start(host, None)


def start(host: Host, fault: Fault | None) -> None:
    host.start_daemon([*FLAGS, *(fault.flags if fault else ())])
    host.wait_ready()

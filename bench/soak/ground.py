"""The hosts that faults happen to, their daemons and their lease store; and what several faults do to them."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from bench.soak.store import DEADLINE_S, REAL_TIME, Store
from udptun.commands import status
from udptun.lab.errors import LabError
from udptun.lab.host import UNDERLAY, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

BACKENDS: Mapping[str, Mapping[str, object]] = {
    "udp": {"Type": "udp"},
    "vtep": {"Type": "vxlan", "Userspace": True},
}
NETWORK = "10.244.0.0/16"

FIRST_STRANGER = 104
"""Third byte of the subnets that nobody but a fault leases: hosts draw theirs from the first hundred."""
_MOVES = range(100, 200)
"""Last byte of the underlay addresses that hosts move to."""


@dataclass(slots=True)
class Ground:
    """`hosts`: the three with pods.  The lab may have others, which come and go."""

    lab: Lab
    hosts: list[Host]
    store: Store
    backend: str

    @property
    def conf(self) -> dict[str, object]:
        """The network config as it is at the beginning, and between two faults."""
        return {"Network": NETWORK, "Backend": dict(BACKENDS[self.backend])}

    @property
    def port(self) -> int:
        """UDP port of the tunnel."""
        return 8285 if self.backend == "udp" else 8472

    @property
    def device(self) -> str:
        return "flannel0" if self.backend == "udp" else "flannel.1"


def read_status(host: Host) -> Any:
    """What `udptun status --json` prints, without starting an interpreter for it."""
    return json.loads(status.fetch(host.path("/run/udptun")))


def shell(host: Host, command: str) -> str:
    """Run a line of the shell on the host; its output."""
    return host.run(["sh", "-ec", command]).stdout


def pids(host: Host) -> tuple[int, int, list[int]]:
    """Daemon, active datapath process and its standbys, by the host's own numbers."""
    facts = read_status(host)
    return facts["pid"], facts["datapath"]["pid"], facts["datapath"]["standby_pids"]


def send_signal(host: Host, name: str, *numbers: int) -> None:
    """By the host's own numbers of its processes."""
    host.run(["kill", f"-{name}", *map(str, numbers)])


def datapath_pids(host: Host) -> set[int]:
    """Every living datapath process that the host has."""
    return {pid for pid, command in processes(host).items() if "datapath/worker.py" in command}


def processes(host: Host) -> dict[int, str]:
    """The living processes of the host: command line by the host's own number."""
    found = {}
    for entry in host.path("/proc").iterdir():
        if entry.name.isdecimal():
            # A zombie has no command line, and others may end while they are looked at.
            with contextlib.suppress(OSError):
                if command := (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip():
                    found[int(entry.name)] = command
    return found


def start(host: Host, *flags: str) -> None:
    host.start_daemon(flags)
    host.wait_ready(DEADLINE_S)


def stop(host: Host, number: signal.Signals = signal.SIGTERM) -> None:
    """Raises LabError when the status is not 0."""
    if (ended := host.stop_daemon(number, DEADLINE_S)) != 0:
        raise LabError(f"the daemon of {host.name} ended with status {ended} after {number.name}")


def wait_dead(host: Host) -> None:
    """Until the daemon, which was killed, is gone."""
    assert host.daemon is not None
    host.daemon.wait(DEADLINE_S)


def wait_full(host: Host, gone: int = 0) -> None:
    """Until the daemon has an active datapath process, which is not `gone`, and a standby.

    After many deaths the pause before the next start is as long as 30 s.
    """

    def is_full() -> bool:
        facts = read_status(host)["datapath"]
        return facts["pid"] not in (None, gone) and len(facts["standby_pids"]) == 1

    wait_until(f"a datapath with a standby on {host.name}", is_full, DEADLINE_S)


def cleanup(ground: Ground, host: Host, *options: str) -> None:
    flags = ground.store.daemon_flags
    host.run([*REAL_TIME, sys.executable, "-m", "udptun", "cleanup", *flags, *options], timeout=DEADLINE_S)


def reconfigure(ground: Ground, changes: Mapping[str, object]) -> None:
    """Put `changes` into Backend of the network config, and have host after host read it."""
    conf = ground.conf
    conf["Backend"] = {**BACKENDS[ground.backend], **changes}
    ground.store.configure(conf)
    for host in ground.hosts:
        assert host.daemon is not None
        host.daemon.send_signal(signal.SIGHUP)
        host.wait_ready(DEADLINE_S)


def other_address(ground: Ground, draw: random.Random) -> IPv4Address:
    """An underlay address that no host has."""
    taken = {host.underlay_address for host in ground.lab.hosts}
    return draw.choice([UNDERLAY[n] for n in _MOVES if UNDERLAY[n] not in taken])


def lease_key(host: Host) -> str:
    """As the store has it."""
    return str(host.subnet).replace("/", "-")


LEAKS = "netdev soak_leaks"


def watch_for_leaks(ground: Ground) -> None:
    """Have the switch count what comes from a host with a pod's address, and no tunnel around it."""
    ports = ", ".join(host.name for host in ground.hosts)
    lines = [
        f"add table {LEAKS}",
        f"add counter {LEAKS} leaked",
        f"add chain {LEAKS} in {{ type filter hook ingress devices = {{ {ports} }} priority -10; }}",
        f"add rule {LEAKS} in ip saddr {NETWORK} counter name leaked",
        f"add rule {LEAKS} in ip daddr {NETWORK} counter name leaked",
    ]
    ground.lab.switch.run(["nft", "; ".join(lines)])


def leaked(ground: Ground) -> int:
    """Frames in clear text so far; those from a pod to a pod count twice."""
    said = json.loads(ground.lab.switch.run(["nft", "-j", f"list counter {LEAKS} leaked"]).stdout)
    (n,) = [it["counter"]["packets"] for it in said["nftables"] if "counter" in it]
    return int(n)

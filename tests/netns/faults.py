"""Faults that more than one test module does to a host of the lab, and how they end."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable

from traffic import read_status

from udptun.lab.host import Host
from udptun.lab.topology import LEASES

Act = Callable[[Host], None]


def shell(*commands: str) -> Act:
    """Run the commands on the host, one after the other."""

    def act(host: Host) -> None:
        for command in commands:
            host.run(["sh", "-c", command])

    return act


def on_pod(command: str) -> Act:
    """Run the command with the address of the host's pod."""
    return lambda host: shell(command.format(host.pod(1).address))(host)


class Background:
    """A program of the host's that goes on from `start` to `stop`."""

    def __init__(self, script: str) -> None:
        self._script = script
        self._process: subprocess.Popen[str] | None = None

    def start(self, host: Host) -> None:
        self._process = host.popen(["sh", "-c", self._script], stderr=subprocess.DEVNULL)

    def stop(self, host: Host) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class StoppedStandby:
    """The datapath process on standby, stopped by a signal from `start` to `stop`."""

    def __init__(self) -> None:
        self._pid = 0

    def start(self, host: Host) -> None:
        (self._pid,) = read_status(host)["datapath"]["standby_pids"]
        host.run(["kill", "-STOP", str(self._pid)])

    def stop(self, host: Host) -> None:
        host.run(["kill", "-CONT", str(self._pid)])


def lease_of_type(kind: str) -> Act:
    """Write the lease of a host that is not there."""
    value = json.dumps({"PublicIP": "192.168.77.200", "PublicIPv6": None, "BackendType": kind})
    script = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); "
        "db.execute('insert or replace into leases (key, value) values (?, ?)', sys.argv[2:]); db.commit()"
    )
    return lambda host: shell(shlex.join([sys.executable, "-c", script, str(LEASES), "10.244.200.0-24", value]))(host)


DHCP_CLIENT = Background(
    "while :; do ip address add 169.254.9.9/16 dev flannel0; ip route add default dev flannel0 metric 50 proto 16; done"
)

"""The background process behind `udptun lab up`, and how the other commands find it.

The owner listens on the abstract Unix socket `@udptun-lab/<name>` of the network namespace that `up` ran in.  Such a
name is no file: it is taken exactly as long as the owner lives.  So a second `up` is refused without a lock file, and
nothing is stale after a crash.  While a connection is open, the owner is alive, and the pid that the kernel names is
its own.

Each connection gets one JSON object, the lab's status, and stays open as long as the client likes.  The client sends
nothing.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import struct
from dataclasses import dataclass
from ipaddress import ip_interface
from typing import Any

from udptun.lab.errors import LabError
from udptun.lab.host import Host
from udptun.lab.topology import Lab

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")

STATUS_TIMEOUT_S = 30
DOWN_TIMEOUT_S = 10

_UCRED = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class RunningLab:
    """A connection to a lab's owner, which is alive while it is open."""

    name: str
    connection: socket.socket
    owner_pid: int

    @classmethod
    def find(cls, name: str) -> RunningLab:
        """Raises LabError when there is no such lab, or when its name is held by another user."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.connect(_address(name))
        except OSError as exc:
            connection.close()
            raise LabError(f"there is no lab named {name}: `udptun lab up --name {name}` makes it") from exc
        pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid != os.geteuid():
            connection.close()
            raise LabError(f"the lab {name} belongs to user {uid} (pid {pid}); choose another --name")
        return cls(name, connection, pid)

    def status(self) -> dict[str, Any]:
        """What `status_of` said; waits while the lab is still coming up."""
        self.connection.settimeout(STATUS_TIMEOUT_S)
        try:
            with self.connection.makefile("r") as lines:
                status = json.loads(lines.readline())
        except (OSError, ValueError) as exc:
            raise LabError(f"the owner of lab {self.name} (pid {self.owner_pid}) does not answer: {exc}") from exc
        assert isinstance(status, dict)
        return status

    def down(self) -> None:
        """End the owner and return when it is gone; SIGKILL if it doesn't go by itself.

        The connection is what identifies it: it ends when the owner does, and before that the pid can't be another's.
        """
        pid_fd = os.pidfd_open(self.owner_pid)
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if self._is_gone(0):
                    return
                signal.pidfd_send_signal(pid_fd, number)
                if self._is_gone(DOWN_TIMEOUT_S):
                    return
        finally:
            os.close(pid_fd)
        raise LabError(f"the owner of lab {self.name} (pid {self.owner_pid}) survived SIGKILL")

    def _is_gone(self, timeout_s: float) -> bool:
        events = select.poll()
        events.register(self.connection, select.POLLRDHUP)
        return bool(events.poll(timeout_s * 1000))


def reserve(name: str) -> socket.socket:
    """Take the lab's name.  Raises LabError when the name is malformed or taken."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(_address(name))
        listener.listen()
    except OSError as exc:
        listener.close()
        raise LabError(f"there is a lab named {name} already: `udptun lab down --name {name}` removes it") from exc
    except BaseException:
        listener.close()
        raise
    return listener


def serve(listener: socket.socket, lab: Lab) -> None:
    """Tell every client the lab's status, until a signal handler raises.

    Connections that are open then stay open until the process ends: their end tells `RunningLab.down` that it has.
    """
    clients: list[socket.socket] = []
    while True:
        # A client that is done has closed its end.  Any other client relies on our end staying open.
        events = select.poll()
        events.register(listener, select.POLLIN)
        for client in clients:
            events.register(client, select.POLLRDHUP)
        ready = {fd for fd, _ in events.poll()}
        for client in [client for client in clients if client.fileno() in ready]:
            clients.remove(client)
            client.close()
        if listener.fileno() in ready:
            client, _ = listener.accept()
            # Fits the socket's buffer many times over, so a client that does not read can't hold us up.
            client.setblocking(False)
            try:
                client.sendall(json.dumps(status_of(lab)).encode() + b"\n")
            except OSError:
                client.close()
            else:
                clients.append(client)


def status_of(lab: Lab) -> dict[str, Any]:
    """The lab as JSON; keys are only ever added within a schema number."""
    return {
        "schema": 1,
        "name": lab.name,
        "owner_pid": os.getpid(),
        "switch": {"name": lab.switch.name, "holder_pid": lab.switch.at().holder_pid},
        "hosts": [_host_status(host) for host in lab.hosts],
    }


def _host_status(host: Host) -> dict[str, Any]:
    up = host.machine.is_up
    status = host.daemon.poll() if host.daemon is not None else None
    try:
        env = host.subnet_env()
    except (LabError, OSError):
        env = {}
    subnet, ipv6_subnet = map(env.get, ("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"))
    return {
        "name": host.name,
        "up": up,
        "holder_pid": host.machine.at().holder_pid,
        "underlay_address": str(host.underlay_address),
        "underlay_ipv6": str(host.underlay_ipv6) if host.lab.has_ipv6 else None,
        "daemon_pid": host.daemon.pid if host.daemon is not None and status is None else None,
        "daemon_exit_status": status,
        "subnet": subnet and str(ip_interface(subnet).network),
        "ipv6_subnet": ipv6_subnet and str(ip_interface(ipv6_subnet).network),
        "mtu": int(env["FLANNEL_MTU"]) if env else None,
        "pods": [
            {
                "name": pod.name,
                "address": str(pod.address),
                "ipv6_address": None if pod.ipv6_address is None else str(pod.ipv6_address),
            }
            for pod in host.pods
        ],
    }


def _address(name: str) -> str:
    if not NAME.fullmatch(name):
        raise LabError(f"{name!r} cannot name a lab: use up to 32 of a-z, 0-9 and -, not - first")
    return f"\0udptun-lab/{name}"

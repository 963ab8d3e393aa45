"""The addresses that host-local has given out: one file each, named for the address, with container ID and interface.

Nobody frees them after a DEL that was lost, or after a reboot (plugins/ipam/host-local/backend/disk).
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
from collections.abc import Callable

from udptun.cni import go_json
from udptun.cni.errors import IO_FAILURE, CniError
from udptun.cni.netconf import members_of
from udptun.cni.state import is_older_than_boot

_DEFAULT_DIR = "/var/lib/cni/networks"
_NO_HOSTS = 3
"""Addresses of a subnet that no container gets: the network's, the gateway's, the broadcast."""


class Reservation:
    """`ifname` is empty in files of old versions, `container_id` in a damaged one.

    `is_older_than_boot`: by its time, the file was made before this boot.
    """

    def __init__(self, address: str, container_id: str, ifname: str, is_older_than_boot: bool) -> None:
        self.address = address
        self.is_older_than_boot = is_older_than_boot
        self.container_id = container_id
        self.ifname = ifname


class Reservations:
    """Those of the network whose delegate has the configuration `conf`.  None where the IPAM is not host-local."""

    def __init__(self, conf: dict[str, object]) -> None:
        ipam = members_of(conf.get("ipam"))
        base = str(ipam.get("dataDir") or _DEFAULT_DIR)
        directory = os.path.join(base, str(conf.get("name", "")))
        is_there = ipam.get("type") == "host-local" and go_json.is_name(directory)
        self._directory = directory if is_there else ""

    def all(self) -> list[Reservation]:
        """In the order of their addresses' text.  Raises CniError."""
        if not self._directory:
            return []
        try:
            names = sorted(os.listdir(self._directory))
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise self._refused("list", exc) from exc
        return [found for name in names if (found := self._read(name)) is not None]

    def _read(self, name: str) -> Reservation | None:
        try:
            # host-local keeps a lock and the last address that it gave in the same directory.
            # It writes no zone, which Python takes.
            if "%" in name:
                return None
            address = str(ipaddress.ip_address(name))
            with open(os.path.join(self._directory, name), encoding="utf-8", errors="replace") as file:
                container_id, _, ifname = file.read().strip().partition("\n")
                is_older = is_older_than_boot(file.fileno())
        except (ValueError, OSError):
            return None
        return Reservation(address, container_id.strip(), ifname.strip(), is_older)

    def free(self, is_leftover: Callable[[Reservation], bool]) -> list[Reservation]:
        """Free those; return them.  host-local gives out nothing meanwhile.  Raises CniError."""
        if not self._directory or not os.path.isdir(self._directory):
            return []
        try:
            fd = os.open(os.path.join(self._directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                freed = [it for it in self.all() if is_leftover(it)]
                for it in freed:
                    os.unlink(os.path.join(self._directory, it.address))
            finally:
                os.close(fd)
        except OSError as exc:
            raise self._refused("free", exc) from exc
        return freed

    def is_full(self, subnets: list[str]) -> bool:
        """Whether one of the subnets has no address left."""
        given = [ipaddress.ip_address(it.address) for it in self.all()]
        networks = [ipaddress.ip_network(subnet) for subnet in subnets]
        return bool(self._directory) and any(
            sum(address in network for address in given) >= network.num_addresses - _NO_HOSTS for network in networks
        )

    def _refused(self, what: str, exc: OSError) -> CniError:
        return CniError(IO_FAILURE, f"cannot {what} the addresses in {self._directory}: {exc.strerror}")

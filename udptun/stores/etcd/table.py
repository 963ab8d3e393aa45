"""What is under `<prefix>/subnets/`: flannel's keys and values as leases, and the table that a watch goes on from."""

from __future__ import annotations

from dataclasses import dataclass

from udptun.core.lease import Lease, LeaseAttrs, LeaseFormatError, Subnets
from udptun.stores.etcd import etcd_pb2 as pb
from udptun.stores.etcd.etcd_leases import EtcdLeases

_PROBLEM_CHARS = 1000
"""What is wrong may be a megabyte long."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is under one key.  `lease` is None when it cannot be read; then `problem` is a line that says why."""

    mod_revision: int
    etcd_lease: int
    lease: Lease | None
    problem: str = ""


Table = dict[bytes, Known]


class LastTable:
    """The table that a snapshot or a watch has left for the next watch.  There is one copy, so a watch takes it out."""

    def __init__(self) -> None:
        self.cluster_id = 0
        """Of the cluster that it is of; 0: not known yet."""
        self._table: Table | None = None
        self._revision = 0

    def put(self, table: Table, revision: int) -> None:
        """This is what is under each key at `revision`.  The table is no longer the caller's."""
        self._table, self._revision = table, revision

    def take(self, revision: int) -> Table | None:
        """The table at just this revision, which is the caller's then; None when it is not known."""
        if self._revision != revision:
            return None
        table, self._table = self._table, None
        return table


class LeaseKeys:
    """Translates between etcd's keys and values and leases."""

    def __init__(self, prefix: str, etcd_leases: EtcdLeases) -> None:
        self._etcd_leases = etcd_leases
        self.first = f"{prefix}/subnets/".encode()
        """Every lease's key begins with it."""
        self.end = self.first[:-1] + b"0"
        """The first key behind all of them: "0" follows "/"."""

    def key(self, name: str) -> bytes:
        """etcd's key of the lease whose key is `name`."""
        return self.first + name.encode()

    def read(self, kv: pb.KeyValue) -> Known:
        """What is under a key."""
        name = kv.key.removeprefix(self.first)
        lease, problem = None, ""
        try:
            if name == kv.key:
                raise LeaseFormatError(f"it is not under {self.first.decode()}")
            subnets = Subnets.from_key(name.decode())
            if subnets.ipv4 is None:
                raise LeaseFormatError("flannel's keys in etcd begin with an IPv4 subnet")
            attrs = LeaseAttrs.from_json(kv.value.decode())
            lease = Lease(subnets, attrs, self._etcd_leases.expiry(kv.lease), kv.mod_revision)
        except LeaseFormatError as exc:
            problem = f"lease {name.decode(errors='backslashreplace')!r}: {exc}"
        except UnicodeDecodeError as exc:
            which = "key" if exc.object == name else "value"
            problem = f"lease {name.decode(errors='backslashreplace')!r}: its {which} is not UTF-8"
        return Known(kv.mod_revision, kv.lease, lease, problem[:_PROBLEM_CHARS])

    def lease(self, kv: pb.KeyValue) -> Lease | None:
        """The lease under a key; None when it is none."""
        return self.read(kv).lease

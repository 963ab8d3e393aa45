"""The etcd store under the contract test: on real servers, plain, with TLS, with users, and as a cluster."""

from __future__ import annotations

import importlib.util
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
from etcd_server import MISSING, Authority, EtcdServer, cluster, running
from store_harness import SUBNETS, Can, host

from udptun.config.flags import parse_daemon_flags

if TYPE_CHECKING:
    from udptun.stores.etcd.store import EtcdStore

NEEDS = [*MISSING, *(f"the module {name}" for name in ("grpc", "google") if not importlib.util.find_spec(name))]


ON_SHARED_SERVERS = pytest.mark.xdist_group("etcd")
"""For tests that use them: when several processes run the tests, one makes the servers and runs all of these."""


class SharedEtcd:
    """Servers that the tests of one session share, because starting one takes a second."""

    def __init__(self) -> None:
        self._undo = ExitStack()
        self._servers: dict[str, list[EtcdServer]] = {}

    def get(self, kind: str) -> list[EtcdServer]:
        if kind not in self._servers:
            directory = Path(self._undo.enter_context(tempfile.TemporaryDirectory(prefix="udptun-etcd-")))
            self._servers[kind] = self._undo.enter_context(running(_make_servers(kind, directory)))
            if kind == "auth":
                (server,) = self._servers[kind]
                server.enable_auth("/test/")
        return self._servers[kind]

    def close(self) -> None:
        """End what was started; a later `get` starts anew."""
        self._undo.close()
        self._servers.clear()


# For hands that write thousands of keys at once.
LARGE_TXN = ("--max-txn-ops=20000", "--max-request-bytes=16777216")


def _make_servers(kind: str, directory: Path) -> list[EtcdServer]:
    if kind == "plain":
        return [EtcdServer(directory, flags=LARGE_TXN)]
    if kind == "cluster":
        return cluster(directory, flags=LARGE_TXN)
    authority = Authority(directory / "tls")
    tls, client = authority.issue("server"), authority.issue("client")
    if kind == "tls":
        return [
            EtcdServer(
                directory,
                tls=tls,
                ca=authority.certificate,
                client_ca=authority.certificate,
                client=client,
                flags=LARGE_TXN,
            )
        ]
    return [EtcdServer(directory, tls=tls, ca=authority.certificate, flags=LARGE_TXN)]


SHARED_ETCD = SharedEtcd()


class EtcdHarness:
    """Against one server without TLS.  The hands are etcdctl's."""

    name = "etcd"
    kind = "plain"
    lacks: Mapping[Can, str] = {Can.KEEP_CONFIG_IN_A_FILE: "it is a key in etcd"}
    needs: Sequence[str] = NEEDS
    slack_descriptors = 8  # grpc closes its sockets when its threads get round to it
    _number: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, directory: Path) -> None:
        self.servers = SHARED_ETCD.get(self.kind)
        self.prefix = f"/test/{next(self._number)}/network"

    def flags(self) -> list[str]:
        """The daemon's flags for it."""
        flags = [
            f"--etcd-endpoints={','.join(server.endpoint for server in self.servers)}",
            f"--etcd-prefix={self.prefix}",
        ]
        server = self.servers[0]
        if server.ca is not None:
            flags.append(f"--etcd-cafile={server.ca}")
        if server.client is not None:
            flags += [f"--etcd-certfile={server.client.certificate}", f"--etcd-keyfile={server.client.key}"]
        if server.user:
            flags += ["--etcd-username=flannel", "--etcd-password=secret"]
        return flags

    def store(self, number: int = 1) -> EtcdStore:
        return etcd_store(*self.flags())

    def key(self, name: str) -> str:
        return f"{self.prefix}/subnets/{name}"

    def etcdctl(self, *arguments: str, stdin: str | None = None) -> str:
        return self.servers[0].etcdctl(*arguments, stdin=stdin)

    def keys(self) -> list[str]:
        """The names of all keys under subnets/."""
        printed = self.etcdctl("get", "--prefix", "--keys-only", self.key(""))
        return [line.removeprefix(self.key("")) for line in printed.splitlines() if line]

    def write(self, leases: Iterable[tuple[int, int]]) -> None:
        wanted = {SUBNETS[subnet].key: host(number).to_json() for subnet, number in leases}
        self.txn(*(f"del {self.key(name)}" for name in self.keys() if name not in wanted))
        self.txn(*(f"put {self.key(name)} {json.dumps(value)}" for name, value in wanted.items()))

    def txn(self, *operations: str, at_once: int = 5000) -> None:
        """`operations` in as few transactions as etcdctl can send."""
        for first in range(0, len(operations), at_once):
            some = "\n".join(operations[first : first + at_once])
            self.etcdctl("txn", stdin=f"\n{some}\n\n\n")

    def spoil(self, number: int) -> str:
        key = SUBNETS[number].key
        self.etcdctl("put", self.key(key), '{"PublicIP":"2001:db8::1"}')
        return key

    def lose_history(self) -> None:
        # The last change before the compaction is still told, so let it be one of something else.
        self.etcdctl("put", f"{self.prefix}/unrelated", "")
        self.etcdctl("compact", str(self.revision()))

    def revision(self) -> int:
        status = json.loads(self.etcdctl("endpoint", "status", "-w", "json"))
        return int(status[0]["Status"]["header"]["revision"])


class EtcdTlsHarness(EtcdHarness):
    """Over TLS, with a client certificate."""

    name = "etcd-tls"
    kind = "tls"


class EtcdAuthHarness(EtcdHarness):
    """Over TLS by the CA alone, as a user who may do no more than the prefix needs."""

    name = "etcd-auth"
    kind = "auth"


class EtcdClusterHarness(EtcdHarness):
    """Three members."""

    name = "etcd-cluster"
    kind = "cluster"


def etcd_store(*flags: str) -> EtcdStore:
    """As the daemon makes it from its flags."""
    from udptun.stores.etcd.store import EtcdStore

    return EtcdStore(parse_daemon_flags(flags, {}).etcd)

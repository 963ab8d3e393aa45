"""Real etcd servers for tests: Debian's etcd, started on loopback or in a namespace, and what faults do to them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DEADLINE_S = 30.0

MISSING = [tool for tool in ("etcd", "etcdctl", "openssl") if shutil.which(tool) is None]
"""What these tests need and this machine lacks."""


_port_claims: list[socket.socket] = []


def free_ports(number: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now, and that no other process that runs tests is given.

    They lie below those that the kernel gives to clients, so that none is taken between here and the server's start.
    An abstract socket with the port in its name, which ends with this process, claims each.
    """
    found: list[int] = []
    port = 10_000
    while len(found) < number:
        port += 1
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0udptun-tests/{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
        else:
            _port_claims.append(claim)
            found.append(port)
    return found


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate and its key, in PEM files."""

    certificate: Path
    key: Path


class Authority:
    """A CA of our own in `directory`."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._ca = KeyPair(directory / f"{name}.pem", directory / f"{name}.key")
        self.certificate = self._ca.certificate
        _openssl(
            *("req", "-x509", *_NEW_KEY, "-keyout", self._ca.key, "-out", self._ca.certificate),
            *("-subj", f"/CN={name}", "-days", "2"),
        )

    def issue(self, name: str, addresses: str = "IP:127.0.0.1,DNS:localhost", expired: bool = False) -> KeyPair:
        """A certificate for `addresses` (subjectAltName), with CN `name`."""
        pair = KeyPair(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        request, extensions = pair.key.with_suffix(".csr"), pair.key.with_suffix(".ext")
        extensions.write_text(f"subjectAltName={addresses}\n")
        _openssl("req", *_NEW_KEY, "-keyout", pair.key, "-out", request, "-subj", f"/CN={name}")
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self._ca.certificate, "-CAkey", self._ca.key, "-CAcreateserial"),
            *("-extfile", extensions, "-out", pair.certificate, "-days", "-1" if expired else "1"),
        )
        return pair


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


GRANT = ("role", "grant-permission", "flannel", "--prefix=true", "readwrite")
"""What docs/operations.md tells to run, before the prefix."""


class EtcdServer:
    """One member.  `command` goes before etcd's and etcdctl's own (ip netns exec ... for one in a namespace).

    `tls`: clients have to come over TLS to this certificate; `client_ca`: with a certificate that this CA signed.
    `control_port`: a second one, for `etcdctl`, so that the first can be cut off.
    """

    def __init__(
        self,
        directory: Path,
        *,
        address: str = "127.0.0.1",
        port: int | None = None,
        control_port: int | None = None,
        name: str = "etcd",
        tls: KeyPair | None = None,
        ca: Path | None = None,
        client_ca: Path | None = None,
        client: KeyPair | None = None,
        peers: Sequence[tuple[str, int]] = (),
        flags: Sequence[str] = (),
        command: Sequence[str] = (),
    ) -> None:
        self.directory = directory / name
        self.name = name
        self.port = port if port is not None else free_ports(1)[0]
        self.control_port = control_port if control_port is not None else self.port
        self.address = address
        self.tls = tls
        self.ca = ca
        self.client = client
        self.user = ""
        """`name:password` for `etcdctl`, once authentication is enabled."""
        self._client_ca = client_ca
        self._peers = peers
        self._flags = list(flags)
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return self._url(self.port)

    def _url(self, port: int) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address}:{port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, wait: bool = True) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        peer_port = dict(self._peers).get(self.name, 0)
        peer_url = f"http://{self.address}:{peer_port}"
        cluster = ",".join(f"{name}=http://{self.address}:{port}" for name, port in self._peers)
        arguments = [
            *self._command,
            "etcd",
            f"--name={self.name}",
            f"--data-dir={self.directory / 'data'}",
            f"--listen-client-urls={','.join(dict.fromkeys(map(self._url, (self.port, self.control_port))))}",
            f"--advertise-client-urls={self.endpoint}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster={cluster or f'{self.name}={peer_url}'}",
            # An acknowledged write survives kill -9 all the same, and the tests do not wait for a disk.
            "--unsafe-no-fsync",
            # Each new client of a user costs one hash: at the default of 10 a twentieth of a second of processor time.
            "--bcrypt-cost=4",
            "--log-outputs=stderr",
            *([f"--cert-file={self.tls.certificate}", f"--key-file={self.tls.key}"] if self.tls else []),
            *(["--client-cert-auth", f"--trusted-ca-file={self._client_ca}"] if self._client_ca else []),
            *self._flags,
        ]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(arguments, stdout=log, stderr=log, env={"PATH": os.environ["PATH"]})
        if wait:
            self.wait_healthy()

    def wait_healthy(self) -> None:
        until(lambda: self._etcdctl("endpoint", "health").returncode == 0, "etcd is healthy", self._log)

    def _log(self) -> str:
        return (self.directory / "log").read_text()[-2000:]

    def wait_listening(self) -> None:
        """For one whose certificate keeps etcdctl out."""

        def listens() -> bool:
            with socket.socket() as client:
                return client.connect_ex((self.address, self.port)) == 0

        until(listens, "etcd listens", self._log)

    def is_leader(self) -> bool:
        (member,) = json.loads(self.etcdctl("endpoint", "status", "-w", "json"))
        return bool(member["Status"]["leader"] == member["Status"]["header"]["member_id"])

    def replace_certificate(self, tls: KeyPair) -> None:
        """etcd reads the files anew for each connection."""
        assert self.tls is not None
        shutil.copy(tls.key, self.tls.key)
        shutil.copy(tls.certificate, self.tls.certificate)

    def kill(self) -> None:
        """kill -9; `start` brings it back with its data."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
            self._process.wait(DEADLINE_S)
            self._process = None

    def freeze(self) -> None:
        """It takes connections (the kernel does) and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def wipe(self) -> None:
        """Lose all data; only while it does not run."""
        shutil.rmtree(self.directory / "data")

    def _etcdctl(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        ca = ["--cacert", str(self.ca)] if self.ca else []
        client = ["--cert", str(self.client.certificate), "--key", str(self.client.key)] if self.client else []
        user = ["--user", self.user] if self.user else []
        command = [*self._command, "etcdctl", "--endpoints", self._url(self.control_port)]
        # By default it gives up after 5 s, of which a busy machine may need more.
        command += ["--dial-timeout=20s", "--command-timeout=20s"]
        command += [*ca, *client, *user, *arguments]
        environment = {"PATH": os.environ["PATH"], "ETCDCTL_API": "3"}
        return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=DEADLINE_S)

    def etcdctl(self, *arguments: str, stdin: str | None = None) -> str:
        """What etcdctl prints; it has to succeed."""
        done = self._etcdctl(*arguments, stdin=stdin)
        assert done.returncode == 0, f"etcdctl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def enable_auth(self, *grants: str) -> None:
        """Users root:rootpw and flannel:secret, the latter with readwrite on the prefixes `grants`."""
        self.etcdctl("user", "add", "root:rootpw")
        self.etcdctl("user", "grant-role", "root", "root")
        self.etcdctl("user", "add", "flannel:secret")
        self.etcdctl("role", "add", "flannel")
        for prefix in grants:
            self.etcdctl(*GRANT, prefix)
        self.etcdctl("user", "grant-role", "flannel", "flannel")
        self.etcdctl("auth", "enable")
        self.user = "root:rootpw"


def cluster(directory: Path, members: int = 3, flags: Sequence[str] = ()) -> list[EtcdServer]:
    """The members of a new cluster, not started."""
    ports = free_ports(2 * members)
    peers = [(f"m{index}", ports[members + index]) for index in range(members)]
    return [
        EtcdServer(directory, name=name, port=ports[index], peers=peers, flags=flags)
        for index, (name, _) in enumerate(peers)
    ]


@contextmanager
def running(servers: Iterable[EtcdServer]) -> Iterator[list[EtcdServer]]:
    """The servers, started together, and stopped at the end."""
    servers = list(servers)
    try:
        for server in servers:
            server.start(wait=False)
        for server in servers:
            server.wait_healthy()
        yield servers
    finally:
        for server in servers:
            server.kill()


def until(
    holds: Callable[[], object], what: str, detail: Callable[[], str] = str, deadline_s: float = DEADLINE_S
) -> None:
    """Wait for a condition, `deadline_s` at most."""
    end_s = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end_s, f"not within {deadline_s} s: {what} {detail()}"
        time.sleep(0.05)

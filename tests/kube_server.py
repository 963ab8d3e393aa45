"""Kubernetes API servers for tests, ours and a real one, and a client of them that shares no code with the product."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from etcd_server import Authority, EtcdServer, free_ports, until

from udptun.lab.host import UNDERLAY
from udptun.lab.kube_api.patch import STRATEGIC

MISSING = [f"the module {name}" for name in ("h11", "lightkube") if find_spec(name) is None]
"""What these tests need and this machine lacks."""

TOKEN, POOR_TOKEN, DAEMONS_TOKEN = "admins-token", "poor-token", "daemons-token"
"""Of one who may do everything, of one who may only get nodes, and of one who may do what a real server is told."""

DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    value: Any
    headers: Mapping[str, str]


class Client:
    """Speaks JSON to an API server, a connection for each request."""

    def __init__(self, url: str, token: str = TOKEN, ca: Path | None = None) -> None:
        self.url = url
        self.token = token
        self.ca = ca

    def _connection(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        if parts.scheme == "http":
            return http.client.HTTPConnection(parts.hostname, parts.port, timeout=DEADLINE_S)
        context = ssl.create_default_context(cafile=self.ca)
        return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=DEADLINE_S, context=context)

    def ask(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Answer:
        connection = self._connection()
        try:
            headers = {"Authorization": f"Bearer {self.token}", "Content-Type": kind}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read()
            try:
                value = json.loads(text)
            except ValueError:
                value = text.decode()
            return Answer(response.status, value, dict(response.getheaders()))
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        answer = self.ask("GET", path)
        assert answer.status == 200, answer
        return answer.value

    @contextmanager
    def watch(self, path: str) -> Iterator[Iterator[Any]]:
        """The events of a stream; they end with it."""
        connection = self._connection()
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {self.token}"})
            response = connection.getresponse()
            assert response.status == 200, response.read()
            yield (json.loads(line) for line in response)
        finally:
            connection.close()

    # ------------------------------------------------------------------------------------------------- the hands

    def add_node(self, name: str, pod_cidrs: str = "", annotations: Mapping[str, str] = {}) -> None:
        """Commas separate the podCIDRs."""
        cidrs = pod_cidrs.split(",")
        spec = {"podCIDR": cidrs[0], "podCIDRs": cidrs} if pod_cidrs else {}
        node = {"kind": "Node", "apiVersion": "v1", "metadata": {"name": name, "annotations": dict(annotations)}}
        answer = self.ask("POST", "/api/v1/nodes", {**node, "spec": spec})
        assert answer.status == 201, answer

    def annotate(self, name: str, annotations: Mapping[str, str | None]) -> None:
        answer = self.ask("PATCH", f"/api/v1/nodes/{name}", {"metadata": {"annotations": annotations}}, STRATEGIC)
        assert answer.status == 200, answer

    def set_condition(self, name: str, kind: str, status: str) -> None:
        body = {"status": {"conditions": [{"type": kind, "status": status, "reason": "Test", "message": "by hand"}]}}
        answer = self.ask("PATCH", f"/api/v1/nodes/{name}/status", body, STRATEGIC)
        assert answer.status == 200, answer

    def condition(self, name: str, kind: str) -> Mapping[str, str] | None:
        conditions = self.get(f"/api/v1/nodes/{name}").get("status", {}).get("conditions", [])
        return next((it for it in conditions if it["type"] == kind), None)

    def delete(self, name: str) -> None:
        answer = self.ask("DELETE", f"/api/v1/nodes/{name}")
        assert answer.status == 200, answer

    def names(self) -> list[str]:
        return [node["metadata"]["name"] for node in self.get("/api/v1/nodes")["items"]]


class Running(Protocol):
    """An API server that runs."""

    url: str
    ca: Path | None

    def compact(self) -> None:
        """Forget what lists have begun."""

    def lose_history(self) -> None:
        """Forget what has happened."""


class Ours:
    """udptun.lab.kube_api, plain or over TLS."""

    def __init__(self, undo: ExitStack, directory: Path, *, with_tls: bool = False) -> None:
        from udptun.lab.kube_api.server import ApiServer

        context, self.ca = None, None
        if with_tls:
            authority = Authority(directory / "tls")
            pair = authority.issue("apiserver")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pair.certificate, pair.key)
            self.ca = authority.certificate
        self.api = undo.enter_context(
            ApiServer(bookmark_s=0.5, tls=context, tokens={TOKEN: None, POOR_TOKEN: frozenset({"get nodes"})})
        )
        self.url = self.api.url

    def compact(self) -> None:
        self.api.do(lambda cluster: cluster.nodes.compact())

    def lose_history(self) -> None:
        self.compact()


class Real:
    """A kube-apiserver with an etcd of its own; `program` is its path."""

    def __init__(self, undo: ExitStack, directory: Path, program: str) -> None:
        self._directory = directory
        self.etcd = EtcdServer(directory)
        self.etcd.start()
        undo.callback(self.etcd.kill)
        port = free_ports(1)[0]
        self.url = f"https://127.0.0.1:{port}"
        authority = Authority(directory / "tls")
        # Labs reach it through a relay at the underlay's switch.
        pair = authority.issue("apiserver", f"IP:127.0.0.1,IP:{UNDERLAY[1]}")
        self.ca = authority.certificate
        key = directory / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        tokens = directory / "tokens.csv"
        tokens.write_text(f'{TOKEN},admin,1,"system:masters"\n{POOR_TOKEN},poor,2\n{DAEMONS_TOKEN},daemon,3\n')
        self._command = [
            program,
            f"--etcd-servers={self.etcd.endpoint}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--cert-dir={directory / 'pki'}",
            f"--tls-cert-file={pair.certificate}",
            f"--tls-private-key-file={pair.key}",
            "--service-account-issuer=https://localhost",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition",
            "--service-cluster-ip-range=10.101.0.0/16",
            "--allow-privileged",
        ]
        undo.callback(self._kill)
        self._start()
        self.let("poor", [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}])

    def let(self, user: str, rules: Sequence[Mapping[str, Any]]) -> None:
        """Give the user these rights."""
        self._create("clusterroles", {"kind": "ClusterRole", "metadata": {"name": user}, "rules": rules})
        group = "rbac.authorization.k8s.io"
        binding = {
            "kind": "ClusterRoleBinding",
            "metadata": {"name": user},
            "subjects": [{"kind": "User", "name": user, "apiGroup": group}],
            "roleRef": {"kind": "ClusterRole", "name": user, "apiGroup": group},
        }
        self._create("clusterrolebindings", binding)

    def _start(self) -> None:
        with (self._directory / "apiserver.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env={"PATH": os.environ["PATH"]})
        admin = Client(self.url, ca=self.ca)
        until(lambda: _is_ready(admin), "the API server is ready", lambda: self._log()[-2000:], 90)

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _create(self, resource: str, value: dict[str, Any]) -> None:
        admin = Client(self.url, ca=self.ca)
        value["apiVersion"] = "rbac.authorization.k8s.io/v1"
        answer = admin.ask("POST", f"/apis/rbac.authorization.k8s.io/v1/{resource}", value)
        assert answer.status == 201, answer

    def _log(self) -> str:
        return (self._directory / "apiserver.log").read_text()

    def compact(self) -> None:
        status = json.loads(self.etcd.etcdctl("endpoint", "status", "-w", "json"))
        self.etcd.etcdctl("compact", str(status[0]["Status"]["header"]["revision"]))

    def lose_history(self) -> None:
        """Its watch cache begins when it starts."""
        self._kill()
        self._start()


def _is_ready(client: Client) -> bool:
    try:
        return client.ask("GET", "/readyz").status == 200
    except OSError:
        return False


class SharedServers:
    """Servers that the tests of one session share, because a real one takes seconds to start."""

    def __init__(self) -> None:
        self._undo = ExitStack()
        self._there: dict[str, Running] = {}

    def get(self, kind: str, directory: Path, program: str | None) -> Running:
        if kind not in self._there:
            if kind == "real":
                assert program is not None
                self._there[kind] = Real(self._undo, directory, program)
            else:
                self._there[kind] = Ours(self._undo, directory, with_tls=kind == "tls")
        return self._there[kind]

    def close(self) -> None:
        self._undo.close()
        self._there.clear()


SHARED = SharedServers()


def write_kubeconfig(
    path: Path, url: str, *, token: str = TOKEN, token_file: Path | None = None, ca: Path | None
) -> Path:
    """A kubeconfig as kubeadm makes one."""
    cluster: dict[str, str] = {"server": url}
    if ca is not None:
        cluster["certificate-authority-data"] = base64.b64encode(ca.read_bytes()).decode()
    user = {"tokenFile": str(token_file)} if token_file else {"token": token}
    value = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(value))  # YAML, too
    return path


def kubectl(kubeconfig: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["kubectl", f"--kubeconfig={kubeconfig}", f"--cache-dir={kubeconfig.parent / 'kubectl'}", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HAS_KUBECTL = shutil.which("kubectl") is not None

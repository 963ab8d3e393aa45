"""Where the leases live, as --store and the flags of each store say.  Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from udptun.config.go_flags import Given, boolean, flag, flags_of, settled_flag
from udptun.core.errors import UsageError
from udptun.core.network_state import socket_address

ETCD_TOPIC, KUBE_TOPIC = "etcd", "Kubernetes"


class StoreKind(Enum):
    """The stores there are."""

    LOCAL = "local"
    FILE = "file"
    ETCD = "etcd"
    KUBE = "kube"


_WITHOUT_PATH = (StoreKind.ETCD, StoreKind.KUBE)


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """What --store says: KIND:PATH, or etcd or kube."""

    kind: StoreKind
    path: Path

    def __str__(self) -> str:
        return self.kind.value if self.kind in _WITHOUT_PATH else f"{self.kind.value}:{self.path}"


def parse_store(text: str) -> tuple[StoreKind, Path | None]:
    """Kind and path; the path of a bare `local` is settled once --state-dir is known."""
    kind, colon, path = text.partition(":")
    if kind not in [known.value for known in StoreKind]:
        raise ValueError("must be local[:PATH], file:PATH, etcd or kube")
    if kind == StoreKind.ETCD.value and colon:
        raise ValueError("takes no path; see --etcd-endpoints and --etcd-prefix")
    if kind == StoreKind.KUBE.value and colon:
        raise ValueError("takes no path; see --kubeconfig-file and --kube-api-url")
    if path:
        return StoreKind(kind), Path(path)
    if colon or kind == StoreKind.FILE.value:
        raise ValueError(f"needs a path: {kind}:PATH")
    return StoreKind(kind), None


# -------------------------------------------------------------------------------------------------------------- etcd

_ETCD_PORT = 2379

_DEFAULT_ENDPOINTS = "http://127.0.0.1:4001,http://127.0.0.1:2379"
"""flannel's."""

_ENDPOINT = re.compile(r"(?:(https?)://)?(\[[0-9A-Fa-f:.]+\]|[^/:@\[\]\s]+)(?::(\d{1,5}))?/?")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server of an etcd cluster, as a URL says."""

    host: str
    port: int
    is_tls: bool

    @property
    def address(self) -> str:
        """See `socket_address`."""
        return socket_address(self.host, self.port)

    def __str__(self) -> str:
        return f"{'https' if self.is_tls else 'http'}://{self.address}"


def _endpoints(text: str, is_tls: bool = False) -> tuple[Endpoint, ...]:
    """Comma-separated URLs; `is_tls` is for one without a scheme."""
    if "@" in text:
        # Not quoted: there may be a password in it.
        raise UsageError("--etcd-endpoints takes no user and password; use --etcd-username and --etcd-password")
    endpoints = []
    for part in filter(None, map(str.strip, text.split(","))):
        match = _ENDPOINT.fullmatch(part)
        if match is None or not 0 < int(match[3] or _ETCD_PORT) < 65536:
            raise ValueError(f"{part!r} is not http://HOST:PORT or https://HOST:PORT")
        scheme, host, port = match.groups()
        with_tls = is_tls if scheme is None else scheme == "https"
        endpoints.append(Endpoint(host.strip("[]"), int(port or _ETCD_PORT), with_tls))
    if not endpoints:
        raise ValueError("must be http://HOST:PORT or https://HOST:PORT, or several with commas")
    return tuple(dict.fromkeys(endpoints))


def _endpoints_text(text: str) -> str:
    """The text itself, once it is known to be good: what no scheme means depends on other flags."""
    _endpoints(text)
    return text


def _prefix(text: str) -> str:
    """As Go's path.Join makes of it."""
    if not text:
        raise ValueError("must be a path such as /coreos.com/network")
    return posixpath.normpath(re.sub("^/+", "/", text)).rstrip("/")


def _path_or_none(text: str) -> Path | None:
    return Path(text) if text else None


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """What the --etcd-* flags say.  The endpoints are all TLS or none is; the prefix has no slash at its end."""

    endpoints: tuple[Endpoint, ...] = settled_flag(
        ETCD_TOPIC, _endpoints_text, _DEFAULT_ENDPOINTS, "URLS", "comma-separated; another when one fails"
    )
    prefix: str = flag(ETCD_TOPIC, _prefix, "/coreos.com/network", "PREFIX", "of the keys config and subnets/...")
    cafile: Path | None = flag(
        ETCD_TOPIC, _path_or_none, None, "FILE", "CA of the servers' certificates; default the system's"
    )
    certfile: Path | None = flag(
        ETCD_TOPIC, _path_or_none, None, "FILE", "our certificate, where etcd asks clients for one"
    )
    keyfile: Path | None = flag(ETCD_TOPIC, _path_or_none, None, "FILE", "its key")
    username: str = flag(ETCD_TOPIC, str, "", "NAME", "user, where etcd's authentication is enabled")
    password: str = flag(
        ETCD_TOPIC, str, "", "PASSWORD", "better in the environment, which other users cannot read", is_secret=True
    )


ETCD_FLAGS = flags_of(EtcdOptions, "etcd-")


def etcd_options(given: Given) -> EtcdOptions:
    values = given.fields_of(ETCD_FLAGS)
    values["endpoints"] = _endpoints(values["endpoints"], is_tls=bool(values["certfile"] or values["cafile"]))
    return EtcdOptions(**values)


def check_etcd(options: EtcdOptions, given: Given) -> None:
    """Raise UsageError when the flags do not go together; leave a warning when some are of no use."""
    is_tls = {endpoint.is_tls for endpoint in options.endpoints}
    if len(is_tls) > 1:
        raise UsageError("--etcd-endpoints mixes http:// and https://; all must be one or the other")
    if (options.certfile is None) != (options.keyfile is None):
        raise UsageError("--etcd-certfile and --etcd-keyfile go together; give both or none")
    if bool(options.username) != bool(options.password):
        raise UsageError("--etcd-username and --etcd-password go together; give both or none")
    if (options.certfile or options.cafile) and is_tls == {False}:
        # flannel 0.18 to 0.20.0 asked for the files even where nothing was encrypted.
        given.warnings.append(
            f"--etcd-cafile, --etcd-certfile and --etcd-keyfile are not used: {options.endpoints[0]} is not encrypted; "
            "write https:// if it can be"
        )


# -------------------------------------------------------------------------------------------------------- Kubernetes


_ANNOTATION_PREFIX = re.compile(r"(?:[a-z0-9_-]+\.)+[a-z0-9_-]+/(?:[a-z0-9_-]*-)?")


def annotation_prefix(text: str) -> str:
    """What the names of the annotations begin with, by flannel's rules (pkg/subnet/kube/annotations.go)."""
    if text.count("/") > 1:
        raise ValueError("can contain at most a single slash")
    prefix = text if "/" in text else f"{text}/"
    if not prefix.endswith(("/", "-")):
        prefix += "-"
    if not _ANNOTATION_PREFIX.fullmatch(prefix):
        raise ValueError("must be DOMAIN or DOMAIN/PREFIX of lower-case letters, digits, - and _, as Kubernetes asks")
    return prefix


@dataclass(frozen=True, slots=True)
class KubeOptions:
    """What flannel's flags for Kubernetes say, and what the environment says.

    The environment names the node that this host is, or the pod that we run in, and the proxy to the API server.
    """

    kube_subnet_mgr: bool = flag(KUBE_TOPIC, boolean, False, "", "leases are node annotations; as --store kube")
    kube_api_url: str = flag(KUBE_TOPIC, str, "", "URL", "the API server, over the kubeconfig's")
    kubeconfig_file: str = flag(KUBE_TOPIC, str, "", "FILE", "how to reach it; default: as a pod, else ~/.kube/config")
    kube_annotation_prefix: str = flag(
        KUBE_TOPIC, annotation_prefix, "flannel.alpha.coreos.com/", "PREFIX", "what the names of annotations begin with"
    )
    set_node_network_unavailable: bool = flag(
        KUBE_TOPIC, boolean, True, "", "set the node's condition NetworkUnavailable to False once pods can talk"
    )
    node_name: str = ""
    pod_namespace: str = ""
    pod_name: str = ""
    https_proxy: str = ""
    http_proxy: str = ""
    no_proxy: str = ""


KUBE_FLAGS = flags_of(KubeOptions)


def kube_options(given: Given, environ: Mapping[str, str]) -> KubeOptions:
    values = given.fields_of(KUBE_FLAGS)
    values |= {name: environ.get(name.upper(), "") for name in ("node_name", "pod_namespace", "pod_name")}
    # In capitals first, as Go reads them.
    values |= {
        name: environ.get(name.upper()) or environ.get(name, "") for name in ("https_proxy", "http_proxy", "no_proxy")
    }
    return KubeOptions(**values)


def check_kube(options: KubeOptions, given: Given, *, is_daemon: bool) -> None:
    """Raise UsageError when nothing tells a daemon which node it is; leave a warning for flags of another store."""
    if is_daemon and not options.node_name and not (options.pod_name and options.pod_namespace):
        raise UsageError(
            "env variables POD_NAME and POD_NAMESPACE must be set, or NODE_NAME: which node of Kubernetes is this host?"
        )
    if said := [given.said[it.name] for it in ETCD_FLAGS.values() if it.name in given.said and given.values[it.name]]:
        given.warnings.append(f"{', '.join(said)} not used: the leases are in Kubernetes")

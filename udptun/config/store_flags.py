"""Where the leases live, as --store and the flags of each store say.  Pure."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from udptun.config.go_flags import Given, boolean, flag, flags_of, settled_flag
from udptun.core.errors import UsageError

ETCD_TOPIC, KUBE_TOPIC = "etcd", "Kubernetes"

BUILT_STORES = "built: local, file, etcd (--store local[:PATH], --store file:PATH or the --etcd-* flags)"
_UNBUILT_STORES = ("kube",)


class StoreKind(Enum):
    """The stores that are built."""

    LOCAL = "local"
    FILE = "file"
    ETCD = "etcd"


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """What --store says: KIND:PATH, or etcd."""

    kind: StoreKind
    path: Path

    def __str__(self) -> str:
        return self.kind.value if self.kind is StoreKind.ETCD else f"{self.kind.value}:{self.path}"


def parse_store(text: str) -> tuple[StoreKind, Path | None]:
    """Kind and path; the path of a bare `local` is settled once --state-dir is known."""
    kind, colon, path = text.partition(":")
    if kind in _UNBUILT_STORES:
        raise UsageError(f"--store {kind} is not built yet; {BUILT_STORES}")
    if kind not in [known.value for known in StoreKind]:
        raise ValueError("must be local[:PATH], file:PATH or etcd")
    if kind == StoreKind.ETCD.value and colon:
        raise ValueError("takes no path; see --etcd-endpoints and --etcd-prefix")
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
        """`host:port`, IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

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


@dataclass(frozen=True, slots=True)
class KubeOptions:
    """flannel's flags for Kubernetes.  They are known, so that they can be refused by name; none does anything yet."""

    kube_subnet_mgr: bool = flag(KUBE_TOPIC, boolean, False, "", "leases as node annotations", is_built=False)
    kube_api_url: str = flag(KUBE_TOPIC, str, "", "URL", "", is_built=False)
    kubeconfig_file: str = flag(KUBE_TOPIC, str, "", "FILE", "", is_built=False)
    kube_annotation_prefix: str = flag(KUBE_TOPIC, str, "flannel.alpha.coreos.com", "PREFIX", "", is_built=False)
    set_node_network_unavailable: bool = flag(KUBE_TOPIC, boolean, True, "", "no effect outside Kubernetes")


KUBE_FLAGS = flags_of(KubeOptions)

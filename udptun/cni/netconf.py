"""A network configuration of type `flannel`, and what becomes of it: the delegate's configuration.  Pure.

The rules are those of flannel-io/cni-plugin (flannel.go, flannel_linux.go).
"""

from __future__ import annotations

import re

from udptun.cni import go_json
from udptun.cni.errors import BAD_CONFIG, BAD_JSON, INCOMPATIBLE_VERSION, CniError
from udptun.cni.subnet_env import SubnetEnv

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Of the CNI specification, oldest first."""

DEFAULT_SUBNET_FILE = "/run/flannel/subnet.env"
DEFAULT_DATA_DIR = "/var/lib/cni/flannel"

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")


class NetConf:
    """What the runtime has passed on stdin.  `members` has all of it."""

    def __init__(self, members: dict[str, object]) -> None:
        self.members = members
        self.cni_version = _string(members, "cniVersion", "")
        if (self.cni_version or "0.1.0") not in VERSIONS:
            details = f'config is "{self.cni_version}", plugin supports {go_json.dumps(list(VERSIONS))}'
            raise CniError(INCOMPATIBLE_VERSION, "incompatible CNI versions", details)
        self.name = _string(members, "name", "")
        if not self.name:
            raise CniError(BAD_CONFIG, "missing network name", "give the configuration a name, such as cbr0")
        if not _NAME.fullmatch(self.name):
            raise CniError(BAD_CONFIG, "invalid characters found in network name", self.name)
        self.subnet_file = _string(members, "subnetFile", DEFAULT_SUBNET_FILE)
        self.data_dir = _string(members, "dataDir", DEFAULT_DATA_DIR)
        self.delegate = _object(members, "delegate") or {}
        self.ipam = _object(members, "ipam")
        self.runtime_config = _object(members, "runtimeConfig")

    def has_at_least(self, version: str) -> bool:
        """Whether the configuration is of this version of the specification or a later one."""
        return VERSIONS.index(self.cni_version or "0.1.0") >= VERSIONS.index(version)


def parse(text: bytes) -> NetConf:
    """Raises CniError."""
    return NetConf(as_object(text, "the network configuration on stdin"))


def as_object(text: bytes, what: str) -> dict[str, object]:
    """The JSON object that `text` is.  Raises CniError, which calls it `what`."""
    try:
        value = go_json.loads(text)
    except ValueError as exc:
        raise CniError(BAD_JSON, f"cannot read {what}: {exc}") from exc
    if not isinstance(value, dict):
        raise CniError(BAD_JSON, f"cannot read {what}: a JSON object is expected, not {_kind(value)}")
    return value


def delegate_conf(conf: NetConf, subnet: SubnetEnv) -> dict[str, object]:
    """The delegate's configuration: what `conf` says of it, and what follows from the host's subnet.

    Raises CniError for a `delegate` that sets what this plugin sets.
    """
    made = dict(conf.delegate)
    if "type" in made and not isinstance(made["type"], str):
        raise CniError(BAD_CONFIG, "'delegate' dictionary, if present, must have (string) 'type' field")
    for key in ("name", "ipam"):
        if key in made:
            message = f"'delegate' dictionary must not have '{key}' field, it'll be set by flannel"
            raise CniError(BAD_CONFIG, message)
    if conf.runtime_config is not None:
        made["runtimeConfig"] = conf.runtime_config
    made["name"] = conf.name
    made.setdefault("type", "bridge")
    # One of the two masquerades: the daemon, or bridge.
    made.setdefault("ipMasq", not subnet.ip_masq)
    made.setdefault("mtu", subnet.mtu)
    if made["type"] == "bridge":
        made.setdefault("isGateway", True)
    if conf.cni_version:
        made["cniVersion"] = conf.cni_version
    made["ipam"] = _ipam(conf, subnet)
    return made


def _ipam(conf: NetConf, subnet: SubnetEnv) -> dict[str, object]:
    ipam = dict(conf.ipam or {})
    ipam.setdefault("type", "host-local")
    ipam["ranges"] = [[{"subnet": own}] for own in subnet.subnets]
    routes = ipam.get("routes")
    if routes is not None and not isinstance(routes, list):
        raise CniError(BAD_CONFIG, "failed to parse ipam.routes", f"a list is expected, not {_kind(routes)}")
    ipam["routes"] = [*(routes or []), *({"dst": network} for network in subnet.networks)]
    return ipam


def with_gateways(result: object) -> object:
    """The result of an ADD, with the gateway at each route that names none, where bridge has put it.

    bridge's CHECK looks for such a route as one without a gateway, and never finds it (pkg/ip/utils_linux.go).
    """
    if not isinstance(result, dict) or not isinstance(result.get("routes"), list):
        return result
    ips = [members_of(ip) for ip in result["ips"]] if isinstance(result.get("ips"), list) else []
    gateways = {":" in gateway: gateway for ip in reversed(ips) if isinstance(gateway := ip.get("gateway"), str)}
    routes = []
    for route in result["routes"]:
        gateway = gateways.get(":" in str(members_of(route).get("dst")))
        has_one = not isinstance(route, dict) or bool(route.get("gw"))
        routes.append(route if has_one or gateway is None else {**route, "gw": gateway})
    return {**result, "routes": routes}


def members_of(value: object) -> dict[str, object]:
    """The members of a JSON object; none of any other value."""
    return value if isinstance(value, dict) else {}


def _string(members: dict[str, object], key: str, default: str) -> str:
    value = go_json.member(members, key)
    if value is None or value == "":
        return default
    if not isinstance(value, str):
        raise CniError(BAD_CONFIG, f"{key} of the network configuration is {_kind(value)}; a string is expected")
    if not go_json.is_name(value):
        raise CniError(BAD_CONFIG, f"{key} of the network configuration has characters in it that no name can have")
    return value


def _object(members: dict[str, object], key: str) -> dict[str, object] | None:
    value = go_json.member(members, key)
    if value is not None and not isinstance(value, dict):
        raise CniError(BAD_CONFIG, f"{key} of the network configuration is {_kind(value)}; an object is expected")
    return value


def _kind(value: object) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")

"""What the daemon tells the plugin: subnet.env, and why there is none yet.

The daemon writes subnet.env when the host's network is ready.  Beside it, in `<subnet.env>.status`, it says all the
time what it is doing (udptun/control/node_status.py).
"""

from __future__ import annotations

import ipaddress
import time

from udptun.cni import go_json
from udptun.cni.errors import BAD_SUBNET_FILE, TRY_AGAIN_LATER, CniError

WAIT_S = 3.0
"""How long an ADD waits for a subnet.env that is not there. A daemon that starts beside its pods needs about a second,
and a runtime tries again by itself."""

_LOOK_AGAIN_S = 0.05
_READ_LIMIT = 64 * 1024
"""Bytes."""
_MTU_DIGITS = 5


class SubnetEnv:
    """`networks` are the whole overlay's, `subnets` this host's, both as text and IPv4 first.  `mtu` is in bytes."""

    def __init__(self, networks: list[str], subnets: list[str], mtu: int, ip_masq: bool) -> None:
        self.networks = networks
        self.subnets = subnets
        self.mtu = mtu
        self.ip_masq = ip_masq


def parse(text: str, path: str) -> SubnetEnv:
    """Raises CniError naming `path` and each key that is missing or unusable."""
    values = {}
    for line in text.splitlines():
        key, sign, value = line.strip().removeprefix("export ").partition("=")
        # A key without a value is as good as missing; flannel's plugin panics at it.
        if sign and value.strip():
            values[key.strip()] = value.strip().strip("\"'")
    missing = [
        *(["FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"] if not _has_one(values, "NETWORK") else []),
        *(["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"] if not _has_one(values, "SUBNET") else []),
        *(key for key in ("FLANNEL_MTU", "FLANNEL_IPMASQ") if key not in values),
    ]
    if missing:
        hint = "the daemon writes all of them; remove a file that was written by hand, and restart the daemon"
        raise CniError(BAD_SUBNET_FILE, f"{path} is missing {', '.join(missing)}", hint)
    networks = [
        _network(values, key, item.strip(), path)
        for key in ("FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK")
        for item in values.get(key, "").split(",")
        if item.strip()
    ]
    subnets = [
        _network(values, key, values[key], path) for key in ("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET") if key in values
    ]
    if not values["FLANNEL_MTU"].isdecimal() or len(values["FLANNEL_MTU"]) > _MTU_DIGITS:
        raise _unusable("FLANNEL_MTU", values["FLANNEL_MTU"], path)
    return SubnetEnv(
        list(dict.fromkeys(networks)), subnets, int(values["FLANNEL_MTU"]), values["FLANNEL_IPMASQ"] == "true"
    )


def _has_one(values: dict[str, str], kind: str) -> bool:
    return f"FLANNEL_{kind}" in values or f"FLANNEL_IPV6_{kind}" in values


def _network(values: dict[str, str], key: str, text: str, path: str) -> str:
    made = ipaddress.IPv6Network if "IPV6" in key else ipaddress.IPv4Network
    try:
        # Python takes an IPv6 zone, which is of use on the host that has written it alone.
        if "/" not in text or "%" in text:
            raise ValueError(text)
        return str(made(text, strict=False))
    except ValueError as exc:
        raise _unusable(key, values[key], path) from exc


def _unusable(key: str, value: str, path: str) -> CniError:
    hint = "remove a file that was written by hand, and restart the daemon"
    return CniError(BAD_SUBNET_FILE, f"{path}: {key}={value[:60]} cannot be used", hint)


def read(path: str, wait_s: float = 0.0) -> SubnetEnv:
    """What the file says; one that is not there is waited for.  Raises CniError, with the daemon's words if need be."""
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            with open(path, "rb") as file:
                return parse(file.read(_READ_LIMIT).decode(errors="replace"), path)
        except FileNotFoundError as exc:
            if time.monotonic() >= deadline_s:
                raise not_ready(path) from exc
            time.sleep(_LOOK_AGAIN_S)
        except OSError as exc:
            raise CniError(BAD_SUBNET_FILE, f"cannot read {path}: {exc.strerror}") from exc


def not_ready(path: str) -> CniError:
    """The error for a subnet.env that is not there: it says what the daemon waits for, and since when."""
    words = _daemons_words(f"{path}.status")
    message = f"udptun on this node is not ready: {words or 'its daemon has not said anything yet'}"
    details = f"failed to load flannel 'subnet.env' file: open {path}: no such file or directory."
    if words:
        return CniError(TRY_AGAIN_LATER, message, f"{details} `udptun status` and the daemon's log say more.")
    hint = "Is the daemon running? Check the flannel pod log for this node, or `systemctl status udptun`."
    return CniError(TRY_AGAIN_LATER, message, f"{details} {hint}")


def _daemons_words(path: str) -> str:
    """What the daemon has said last, and for how long that has been so; empty when there is nothing to be read."""
    try:
        with open(path, "rb") as file:
            said = go_json.loads(file.read(_READ_LIMIT))
    except (OSError, ValueError):
        return ""
    if not isinstance(said, dict) or not isinstance(said.get("reason"), str):
        return ""
    if said.get("state") == "ready":
        return "its daemon is ready, but somebody has deleted the file; restart the daemon"
    since_s = said.get("since")
    if not isinstance(since_s, int | float) or not abs(since_s) < 1e12:
        return str(said["reason"])
    return f"{said['reason']} (since {max(time.time() - since_s, 0):.0f} s)"

"""subnet.env: what CNI plugins and Docker read to learn this host's subnet (flannel pkg/subnet/subnet.go).

`render`, `parse` and `parse_networks` are pure.  The other functions read or write the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import TypeVar

from udptun.config import env_file
from udptun.config.net_conf import NetConf
from udptun.core import atomic_file
from udptun.core.errors import KernelError, one_line
from udptun.core.ip_text import ipv6_network
from udptun.core.lease import Subnets

_READ_LIMIT = 64 * 1024
"""Bytes.  A subnet.env has about a hundred."""


def render(conf: NetConf, subnets: Subnets, mtu: int, ip_masq: bool) -> str:
    """The file's text, byte for byte as flannel writes it.

    `mtu` is that of the device, bytes.  The line of the subnet has its second address (network + 1), which CNI's bridge
    and Docker take as the gateway's.
    """
    lines = []
    if conf.ipv4 is not None and subnets.ipv4 is not None:
        lines += [f"FLANNEL_NETWORK={conf.ipv4.network}", f"FLANNEL_SUBNET={_gateway(subnets.ipv4)}"]
    if conf.ipv6 is not None and subnets.ipv6 is not None:
        lines += [f"FLANNEL_IPV6_NETWORK={conf.ipv6.network}", f"FLANNEL_IPV6_SUBNET={_gateway(subnets.ipv6)}"]
    lines += [f"FLANNEL_MTU={mtu}", f"FLANNEL_IPMASQ={str(ip_masq).lower()}"]
    return "".join(f"{line}\n" for line in lines)


def _gateway(subnet: IPv4Network | IPv6Network) -> str:
    return f"{subnet.network_address + 1}/{subnet.prefixlen}"


def parse(text: str) -> tuple[Subnets | None, str]:
    """The subnets that an earlier run wrote down, and what is wrong with the text ("" when nothing is).

    Never raises.  It is as lenient as flannel's reader: quotes, `export`, blanks and comments are allowed.  In a list
    of subnets the bad ones are skipped, and more than one good one counts as none.
    """
    values = env_file.parse(text)
    wrong: list[str] = []
    ipv4 = _subnet(values, "FLANNEL_SUBNET", _ipv4_network, wrong)
    ipv6 = _subnet(values, "FLANNEL_IPV6_SUBNET", _ipv6_network, wrong)
    if ipv4 is None and ipv6 is None:
        return None, one_line("; ".join(wrong)) or "no FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET in it"
    return Subnets(ipv4, ipv6), one_line("; ".join(wrong))


def parse_networks(text: str) -> tuple[IPv4Network, IPv4Network] | None:
    """The IPv4 Network and subnet of the run that wrote the text; None unless it has exactly one of each.

    Never raises.
    """
    values, wrong = env_file.parse(text), list[str]()
    network = _subnet(values, "FLANNEL_NETWORK", _ipv4_network, wrong)
    subnet = _subnet(values, "FLANNEL_SUBNET", _ipv4_network, wrong)
    return None if network is None or subnet is None else (network, subnet)


_Network = TypeVar("_Network", IPv4Network, IPv6Network)


def _subnet(
    values: Mapping[str, str], key: str, network: Callable[[str], _Network], wrong: list[str]
) -> _Network | None:
    good: list[_Network] = []
    for item in filter(None, map(str.strip, values.get(key, "").split(","))):
        try:
            good.append(network(item))
        except ValueError:
            wrong.append(f"{key}: {item[:60]!r} is not a subnet")
    if len(good) > 1:
        wrong.append(f"{key}: {len(good)} subnets where one is expected")
        return None
    return good[0] if good else None


def _ipv4_network(text: str) -> IPv4Network:
    address, slash, length = text.partition("/")
    if not slash or not length.isdecimal():
        raise ValueError(text)
    return IPv4Network(f"{address}/{length}", strict=False)


def _ipv6_network(text: str) -> IPv6Network:
    if "/" not in text:
        raise ValueError(text)
    return ipv6_network(text, strict=False)


def read_previous(path: Path) -> tuple[Subnets | None, str]:
    """`parse` of the file; the reason names the file.  A file that is not there gives (None, "")."""
    try:
        subnets, wrong = parse(_read(path))
    except FileNotFoundError:
        return None, ""
    except OSError as exc:
        return None, f"cannot read {path}: {exc.strerror}"
    return subnets, f"{path}: {wrong}" if wrong else ""


def read_networks(path: Path) -> tuple[IPv4Network, IPv4Network] | None:
    """`parse_networks` of the file; None when it cannot be read."""
    try:
        return parse_networks(_read(path))
    except OSError:
        return None


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_READ_LIMIT).decode(errors="replace")


def write(path: Path, text: str) -> None:
    """Replace the file in one step: a reader sees the old or the new text, also after a power failure.

    The file gets mode 0644, and directories that had to be made 0755, whatever the umask.  Raises KernelError naming
    the path; the old file is then untouched.
    """
    try:
        _make_directory(path.parent)
        atomic_file.replace(path, text, 0o644)
    except OSError as exc:
        raise KernelError(
            f"cannot write {path}",
            exc.errno or 0,
            "make room and let root write there, or choose another --subnet-file",
        ) from exc


def rewrite(path: Path, text: str) -> None:
    """As `write`, but the lines of other programs stay, such as Docker's options.  For a network that is in use."""
    try:
        lines = _read(path).splitlines()
    except OSError:
        lines = []
    theirs = [line for line in lines if (name := env_file.name_of(line)) and not name.startswith("FLANNEL_")]
    write(path, text + "".join(f"{line}\n" for line in theirs))


def _make_directory(directory: Path) -> None:
    for missing in reversed([one for one in (directory, *directory.parents) if not one.exists()]):
        missing.mkdir(exist_ok=True)
        missing.chmod(0o755)

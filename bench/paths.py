"""The paths that are compared: from the first pod of h1 to the first pod of h2, all in one lab."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

from udptun.lab.comparison import kernel_vxlan, plain_routing
from udptun.lab.errors import LabError
from udptun.lab.topology import Lab, Pod

TUNNEL = "udptun"
PLAIN = "plain routing"
VXLAN = "kernel vxlan"

# What `ip` says for RTNETLINK's EOPNOTSUPP to a link type that no module provides, with and without its help text.
_NO_SUCH_LINK_TYPE = ("Unknown device type", "Operation not supported")


@dataclass(frozen=True, slots=True)
class Path:
    """One way from `client` to `server`, which is reached at `address`; `mtu` in bytes."""

    name: str
    mtu: int
    client: Pod
    server: Pod
    address: IPv4Address


@dataclass(frozen=True, slots=True)
class Paths:
    """What can be measured in this lab, and what cannot: name -> reason."""

    present: tuple[Path, ...]
    missing: dict[str, str]


def connect(lab: Lab) -> Paths:
    """Set up the paths beside the daemon's own in a started lab.  A kernel without vxlan costs only that path."""
    client, server = lab.host(1).pod(1), lab.host(2).pod(1)
    plain = plain_routing(lab)
    present = [
        Path(TUNNEL, lab.host(1).mtu, client, server, server.address),
        Path(PLAIN, plain.mtu, client, server, plain.address(server)),
    ]
    try:
        vxlan = kernel_vxlan(lab)
    except LabError as exc:
        if not any(answer in str(exc) for answer in _NO_SUCH_LINK_TYPE):
            raise
        return Paths(tuple(present), {VXLAN: "this kernel has no vxlan"})
    present.append(Path(VXLAN, vxlan.mtu, client, server, vxlan.address(server)))
    return Paths(tuple(present), {})


def interleave(paths: tuple[Path, ...], n_rounds: int) -> Iterator[tuple[int, tuple[Path, ...]]]:
    """The rounds, from 0, each with all paths; every round begins with the next one.

    So a machine that slows down or speeds up meanwhile does it to all alike, and none is always first.
    """
    for i in range(n_rounds):
        first = i % len(paths)
        yield i, paths[first:] + paths[:first]

"""What keeps the daemons of one host apart: each has directories, a Network and devices of its own.

A daemon claims its files and its Network in the network namespace (`udptun.kernel.claims`).  A second daemon that would
use them ends with one line before it has touched anything.  The state directory remembers the Networks of a daemon, so
that what an earlier run with another Network has left is known for ours.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from udptun.config import subnet_env
from udptun.config.flags import Options
from udptun.core import atomic_file
from udptun.core.errors import ConfigError, KernelError, UdptunError
from udptun.core.family import Family
from udptun.core.ip_text import ip_network
from udptun.core.lease import overlap
from udptun.core.network_state import IPNetwork
from udptun.core.ownership import Ownership
from udptun.kernel.claims import Claims, describe_holder, locked, names_held
from udptun.kernel.reconcile.ownership import marked_networks, remove_ours

log = logging.getLogger(__name__)

NETWORKS_FILE = "networks"
"""In the state directory: the Networks of this daemon, one a line, the present one of each family first."""

_STARTING_S = 15.0
"""How long a start waits for that of another daemon; adopting a datapath that hangs takes 5 s."""


def starting() -> AbstractAsyncContextManager[None]:
    """The time in which a daemon chooses the name of its device and makes the device.  One daemon at a time does so."""
    return locked("start", _STARTING_S)


def claim_files(claims: Claims, options: Options) -> None:
    """Be the only daemon of the state directory and of subnet.env.  Raises UdptunError naming the one that is.

    A second call claims what the files have become: a directory may have been made meanwhile.
    """
    state, subnet = options.state_dir, options.subnet_file
    for flag, path, identity in (
        ("--state-dir", state, _identity(state)),
        ("--subnet-file", subnet, f"{_identity(subnet.parent)}/{subnet.name}"),
    ):
        pid = claims.take(f"file {identity}")
        if pid is not None and pid != os.getpid():
            raise UdptunError(
                f"another udptun daemon ({describe_holder(pid)}) uses {path}; stop it, or give this one a {flag} "
                "of its own"
            )


async def claim_network(claims: Claims, network: IPNetwork, options: Options) -> Ownership:
    """Be the only daemon of this host whose Network has any of these addresses; return what of that family is ours.

    A daemon with two families claims the Network of each.

    Raises ConfigError naming the daemon that has such a Network, and KernelError.
    """
    pid = claims.take(f"network {network}")
    if pid is not None:
        raise _taken(network, network, f"another udptun daemon on this host ({describe_holder(pid)})")
    running = [other for other in _networks_held() if other.version == network.version and other != network]
    for other in running:
        if overlap(other, network):
            raise _taken(network, other, "another udptun daemon on this host")
    marked = {name: it for name, it in (await marked_networks()).items() if it.version == network.version}
    earlier = _recall(options.state_dir)
    if earlier is None:
        written = subnet_env.read_networks(options.subnet_file)
        # A device with this Network in its alias is of a daemon that would have remembered it.
        earlier = [written[0]] if written is not None and written[0] not in marked.values() else []
    earlier = [
        it
        for it in earlier
        if it.version == network.version and it != network and not any(overlap(it, other) for other in running)
    ]
    for device, other in marked.items():
        if overlap(other, network) and other not in (network, *earlier):
            remedy = "`udptun cleanup` with its flags removes what it has left"
            raise _taken(network, other, f"the udptun daemon that made {device}", remedy)
    return Ownership((network, *earlier))


def former_networks(options: Options, families: Sequence[Family]) -> tuple[IPNetwork, ...]:
    """The Networks of this daemon's earlier runs that are of none of these `families`, and that no daemon has now."""
    running = [*_networks_held()]
    return tuple(
        it
        for it in _recall(options.state_dir) or ()
        if Family(it.version) not in families and not any(overlap(it, other) for other in running)
    )


async def remove_former(networks: Sequence[IPNetwork], device: str) -> None:
    """Take out what the kernel has of these Networks; of `device`, which is in use, addresses alone.

    Raises KernelError.
    """
    async with starting():
        lines = await remove_ours(Ownership(tuple(networks)), keep=device)
    removed = [line for line in lines if line.startswith("deleted ")]
    log.info(
        "what a family had that is enabled no longer is removed networks=%s changes=%r",
        ",".join(map(str, networks)),
        "; ".join(removed),
    )


def claim_leftovers(claims: Claims, options: Options) -> Ownership:
    """Be the only daemon of the Networks that the daemon with these files had; return what belongs to it.

    Raises UdptunError when another daemon runs with one of them.
    """
    networks = _recall(options.state_dir)
    if networks is None:
        written = subnet_env.read_networks(options.subnet_file)
        networks = [] if written is None else [written[0]]
    for network in networks:
        pid = claims.take(f"network {network}")
        if pid is not None:
            raise UdptunError(
                f"another udptun daemon ({describe_holder(pid)}) has the Network {network}; stop it, or give the "
                "--run-dir, --state-dir and --subnet-file of the daemon whose things shall go"
            )
    return Ownership(tuple(networks))


def remember(state_dir: Path, networks: Sequence[IPNetwork]) -> None:
    """Have the next start, and `udptun cleanup`, know that what lies in these Networks is ours.  Raises KernelError."""
    path = state_dir / NETWORKS_FILE
    try:
        atomic_file.replace(path, "".join(f"{network}\n" for network in networks))
    except OSError as exc:
        raise KernelError(f"cannot write {path}", exc.errno or 0, "make room and let root write there") from exc


def _recall(state_dir: Path) -> list[IPNetwork] | None:
    """The Networks of the runs before; None when nothing is known of any."""
    path = state_dir / NETWORKS_FILE
    try:
        return [ip_network(line) for line in path.read_text(encoding="utf-8").split()]
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        log.warning("the Networks of earlier runs are unknown path=%s error=%s", path, exc)
        return None


def _networks_held() -> Iterable[IPNetwork]:
    for name in names_held("network"):
        try:
            yield ip_network(name)
        except ValueError:
            log.debug("ignoring a name that is no Network name=%r", name)


def _taken(network: IPNetwork, other: IPNetwork, who: str, remedy: str = "") -> ConfigError:
    what = "it" if other == network else f"{other}, which overlaps it"
    remedies = ["give each daemon a Network of its own", *filter(None, [remedy])]
    return ConfigError(f"Network: {network} cannot be ours: {who} has {what}; {'; '.join(remedies)}")


def _identity(path: Path) -> str:
    """The same for two paths exactly when they lead to the same directory, also one that is not there yet.

    The paths themselves say too little: another daemon may have other mounts.
    """
    missing = ""
    while True:
        try:
            found = path.stat()
        except OSError:
            path, missing = path.parent, f"/{path.name}{missing}"
        else:
            return f"{found.st_dev}:{found.st_ino}{missing}"

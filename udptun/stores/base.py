"""What every lease store promises.

A store is a shared map from lease key to lease, with one revision that only grows.  Three operations read it
(`snapshot`, `watch`, `network_config`), and three change it (`claim`, `renew`, `release`).  Operators have two more
(`reserve`, `delete`), which no daemon calls.  All are called from one event loop, and by one task at a time; only
`watch` runs beside the others.

Two errors say who has to act.  StoreUnavailableError: nobody has to, trying again may help.  ConfigError: a person has
to mend the store (a corrupt file, a missing directory), and trying again is harmless and useless.  A running daemon
keeps its table over both.

Who a host is, is the store's to say where it knows hosts by name (`node_name`), and NodeID and PublicIP say it
elsewhere.  What a store answers to `claim` and `renew` is what it has, which may differ from what was asked for.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Protocol

from udptun.core.errors import ConfigError, LeaseError
from udptun.core.family import Family
from udptun.core.lease import Lease, LeaseAttrs, LeaseEvent, Subnets, is_same_host

LEASE_TTL_S = 86_400
"""How long a lease lasts without renewal, seconds (flannel pkg/subnet/etcd subnetTTL)."""


RECONNECTS_PER_S = 2000
"""So many hosts a second connect to a server that is back, when all of them have lost it."""

LONGEST_SPREAD_S = 10.0


def reconnect_spread_s(n_hosts: int) -> float:
    """Over how many seconds `n_hosts` spread their attempts, each by chance: 0.05 for 100, 5 for 10,000."""
    return min(n_hosts / RECONNECTS_PER_S, LONGEST_SPREAD_S)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every valid lease at `revision`.  `skipped`: a line for each refused item, with its key and the reason."""

    revision: int
    leases: tuple[Lease, ...]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """What changed up to and including `revision`, in order.

    With `snapshot` set, the store could not tell the difference (compaction, a replaced file).  The caller then takes
    the snapshot as the whole truth and ignores everything else.

    `skipped` has a line for each item that is refused from now on.  `mended` has the lines, out of batches or snapshots
    before, whose items are good now or gone.  No line is in both.
    """

    revision: int
    events: tuple[LeaseEvent, ...] = ()
    snapshot: Snapshot | None = None
    skipped: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SubnetChoice:
    """What a claim shall do: take `subnets`, after deleting the keys in `drop` (own leases that do not fit).

    A reservation is an operator's, and no claim loses one, see `dropped_by`.
    """

    subnets: Subnets
    drop: tuple[str, ...] = ()


Chooser = Callable[[Sequence[Lease]], SubnetChoice]
"""Given every lease, decide what to claim.  Pure: a store may call it on another thread, and again after a lost race.

Raises a LeaseError, such as SubnetExhaustedError, which the store lets through without changing anything.
"""


class Store(Protocol):
    """See the module's text.  Every method may raise StoreUnavailableError or ConfigError."""

    name: str
    """What the command line calls the store, for messages: `local:/path`, `etcd`."""

    config_name: str
    """Where the network config is, for messages: a path, or the key in etcd."""

    is_remote: bool
    """Whether a server keeps the leases (etcd, Kubernetes).  Two things follow.

    Only the store ends a lease.  Its server may keep time otherwise than this host: etcd's time stands still while it
    is down.  So a lease in use stays in use until the store reports its removal, also while the store is away.

    `expires_s` of another host's lease is the earliest end that is known.  It begins as the time of looking, which is
    past at once; later the watch has asked, and repeats the lease with a better one.  It decides whether a lease out of
    the state file may be used, and nothing else.  It is exact for a lease that this object claimed or renewed.
    """

    is_config_remote: bool
    """Whether the server keeps the network config, too (etcd), where it is mended for all hosts at once.

    A daemon waits for one that is missing or broken, as flannel does.  Otherwise it is a file, and the daemon ends.
    """

    keeps_backend_data: bool
    """Whether a lease says of its host what the host's backend needs to say (BackendData).

    A leases file has the addresses and the port alone.
    """

    keeps_ipv6_alone: bool
    """Whether there are leases without an IPv4 subnet.  flannel's keys in etcd begin with one."""

    @property
    def node_name(self) -> str:
        """What the store calls this host; empty where it knows hosts by PublicIP and NodeID.

        With a name, a lease with that `Lease.node_name` is ours and no other is.  It may be known only after the first
        call.
        """

    @property
    def problems(self) -> tuple[str, ...]:
        """A line for each thing that is wrong with what the store has, and that no call fails of.

        May be read on another thread.
        """

    async def network_config(self) -> str:
        """The text of net-conf.json.  Raises ConfigError when there is none, saying where it should be."""

    async def public_addresses(self) -> PublicAddresses:
        """What an operator has set in the store as this host's, as --public-ip and --public-ipv6 would."""

    def want_families(self, families: Collection[Family]) -> None:
        """What pods have by the network config.  Called before the first claim.

        A store that allocates itself gives no lease without a subnet of any of them.
        """

    async def snapshot(self, *, exact: bool = False) -> Snapshot:
        """All leases.  `exact`: with their true expiries, which costs a remote store one more request for each."""

    def watch(self, after: int) -> AsyncGenerator[WatchBatch, None]:
        """Changes after revision `after`, as they come.  The end of a lease is reported as a removal.

        Never ends by itself.  Closing it (`contextlib.aclosing`) frees what it holds.  It ends with the error that it
        raises; the caller starts another from the last revision it saw, after 0.1 to 0.5 s.  A store whose server needs
        longer pauses makes them itself.  A batch may be empty, or repeat a lease of which only the expiry is new.
        """

    async def claim(self, attrs: LeaseAttrs, choose: Chooser, ttl_s: int = LEASE_TTL_S) -> Lease:
        """Take the subnet that `choose` picks, atomically against every other claimer.

        If that lease is there already, it is rewritten with `attrs` and a fresh expiry; a reservation (no expiry) stays
        one.  A claim that was cancelled may have happened all the same.

        The lease is as the store has it then.  Where an operator has overwritten the PublicIP its `attrs` are not the
        `attrs` that were asked for.  A store that allocates itself (a leases file, Kubernetes) does not ask `choose`.
        """

    async def renew(self, lease: Lease, ttl_s: int = LEASE_TTL_S) -> Lease:
        """Write `lease` again with a fresh expiry.  LeaseLostError when it is gone or another node's."""

    async def release(self, lease: Lease) -> None:
        """Give the lease back if it is still ours.  A reservation stays; a lease that is gone is no error."""

    async def note_ready(self, lacks: Sequence[str]) -> None:
        """The host's pods can talk from now on.  Called once, after the claim; it does not wait for a server.

        `lacks`: a line for each address family by which they cannot.
        """

    async def reserve(self, subnets: Subnets, attrs: LeaseAttrs) -> Lease:
        """Keep `subnets` for the node with `attrs`: a lease that never expires, which that node's claim takes over.

        A lease that this node (PublicIP and port) already holds stays as it is, without its expiry.  LeaseError when it
        is another node's.
        """

    async def delete(self, lease: Lease) -> None:
        """Delete a lease or reservation, whoever holds it.  LeaseError when it is no longer as `lease` shows it."""

    async def aclose(self) -> None:
        """Free threads, connections and files.  No other call may follow; closing twice does no harm."""


@dataclass(frozen=True, slots=True)
class PublicAddresses:
    """A host's PublicIP and PublicIPv6, as far as somebody has said them."""

    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None


class HostsWithoutNames:
    """What a store answers in which a host is what its lease says of it, and which nobody annotates."""

    node_name = ""
    problems: tuple[str, ...] = ()

    async def public_addresses(self) -> PublicAddresses:
        return PublicAddresses()

    def want_families(self, families: Collection[Family]) -> None:
        pass

    async def note_ready(self, lacks: Sequence[str]) -> None:
        pass


def is_same_node(a: LeaseAttrs, b: LeaseAttrs) -> bool:
    """Whether one host wrote both: by NodeID where both have one, else by address, flannel's identity."""
    if a.node_id is not None and b.node_id is not None:
        return a.node_id == b.node_id
    return is_same_host(a, b)


def dropped_by(choice: SubnetChoice, leases: Iterable[Lease]) -> tuple[list[Lease], bool]:
    """Which of `leases` a claim of `choice` deletes, and whether what it takes is a reservation in their place.  Pure.

    A reservation in `choice.drop` is deleted only if the subnet of one family is taken: that of the other changes, and
    it stays a reservation under the other key.
    """
    there = [lease for lease in leases if lease.key in choice.drop]
    dropped = [lease for lease in there if not lease.is_reservation or lease.subnets.overlap(choice.subnets)]
    return dropped, any(lease.is_reservation for lease in dropped)


def reservation(leases: Iterable[Lease], subnets: Subnets, attrs: LeaseAttrs) -> LeaseAttrs:
    """What to write to reserve `subnets` for the node with `attrs`, where `leases` is all there is.  Pure.

    It is what the node itself has written there, if it has.  LeaseError when the subnet overlaps another node's lease,
    or when another subnet is reserved for this node.
    """
    for lease in leases:
        port, other_port = attrs.port(0), lease.attrs.port(0)
        is_same = is_same_host(lease.attrs, attrs) and (port == other_port or not port or not other_port)
        if lease.subnets == subnets and is_same:
            attrs = lease.attrs
        elif lease.subnets.overlap(subnets):
            raise LeaseError(
                f"cannot reserve {subnets.first}: {lease.subnet} is leased to {lease.attrs.host_address}"
            )
        elif is_same and lease.is_reservation:
            raise LeaseError(
                f"cannot reserve {subnets.first}: {lease.subnet} is reserved for {attrs.host_address} already; "
                "a node has one subnet"
            )
    return attrs


def read_network_config(path: Path) -> str:
    """The text of the net-conf.json at `path`, for stores that keep it in a file.  Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as exc:
        raise ConfigError(
            f"no network config at {path}: write it, for example "
            '{"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}, '
            "or name another file with --net-config-path"
        ) from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read the network config {path}: {reason(exc)}") from exc


def reason(exc: OSError | UnicodeDecodeError) -> str:
    """What the system said, without the path, which the message around it names."""
    return (exc.strerror or str(exc)) if isinstance(exc, OSError) else f"not UTF-8 at byte {exc.start}"

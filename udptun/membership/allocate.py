"""Choose the subnet that this host leases.  Pure: the random numbers come from the caller.

flannel's order (pkg/subnet/etcd/local_manager.go, tryAcquireLease): our own lease, the subnet we had before, a
random one of the first hundred free.  What differs, each because flannel's way loses a subnet or picks a bad one:
a node is PublicIP and port, so that several can share an address; a subnet is free when it overlaps no lease, not
just when no lease has the same key; the subnet we had before is also ours when a lease with our own NodeID holds
it, which is a host that moved to another address; each family is kept on its own when only the other has to change.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from udptun.config.net_conf import NetConf
from udptun.core.errors import SubnetExhaustedError
from udptun.core.lease import Lease, Subnets
from udptun.membership.identity import Identity
from udptun.stores.base import Chooser, SubnetChoice

CANDIDATES = 100
"""How many free subnets, ascending, the random choice is among."""


def chooser(conf: NetConf, me: Identity, previous: Subnets | None, rng: random.Random) -> Chooser:
    """How `me` picks its subnets under `conf`.

    `previous` is what subnet.env says we had.  The chooser raises SubnetExhaustedError, with the counts, when
    nothing between SubnetMin and SubnetMax is free.
    """

    def is_ours(lease: Lease) -> bool:
        moved = lease.attrs.node_id == me.node_id and lease.subnets == previous
        return moved or me.owns(lease)

    def choose(leases: Sequence[Lease]) -> SubnetChoice:
        # Ours by address before ours by node id; of several the one that we wrote and have used, which pods are in;
        # then in key order as flannel.
        ours = sorted(
            filter(is_ours, leases),
            key=lambda it: (not me.owns(it), it.attrs.node_id != me.node_id, it.subnets != previous, it.key),
        )
        kept = next((lease.subnets for lease in ours if fits(lease.subnets, conf)), None)
        drop = tuple(lease.key for lease in ours if lease.subnets != kept)
        if kept is not None:
            return SubnetChoice(kept, drop)
        others = [lease.subnets for lease in leases if not is_ours(lease)]
        return SubnetChoice(Subnets(_ipv4(conf, others, previous, rng), _ipv6(conf, others, previous, rng)), drop)

    return choose


def fits(subnets: Subnets, conf: NetConf) -> bool:
    """Whether a lease of these is what `conf` would hand out."""
    if not _ipv4_fits(subnets.ipv4, conf):
        return False
    if not conf.enable_ipv6:
        return subnets.ipv6 is None
    return subnets.ipv6 is not None and _ipv6_fits(subnets.ipv6, conf)


def _ipv4_fits(subnet: IPv4Network, conf: NetConf) -> bool:
    return subnet.prefixlen == conf.subnet_len and conf.subnet_min <= subnet.network_address <= conf.subnet_max


def _ipv6_fits(subnet: IPv6Network, conf: NetConf) -> bool:
    assert conf.ipv6_subnet_min is not None
    assert conf.ipv6_subnet_max is not None
    return (
        subnet.prefixlen == conf.ipv6_subnet_len
        and conf.ipv6_subnet_min <= subnet.network_address <= conf.ipv6_subnet_max
    )


def _ipv4(conf: NetConf, others: Iterable[Subnets], previous: Subnets | None, rng: random.Random) -> IPv4Network:
    taken = [_range(subnets.ipv4) for subnets in others]
    wish = previous.ipv4 if previous is not None and _ipv4_fits(previous.ipv4, conf) else None
    pool = _Pool(int(conf.subnet_min), int(conf.subnet_max), 1 << (32 - conf.subnet_len))
    base = pool.pick(None if wish is None else int(wish.network_address), taken, rng)
    if base is None:
        raise _exhausted(pool, taken, f"{conf.subnet_min} and {conf.subnet_max} (/{conf.subnet_len})")
    return IPv4Network((base, conf.subnet_len))


def _ipv6(conf: NetConf, others: Iterable[Subnets], previous: Subnets | None, rng: random.Random) -> IPv6Network | None:
    if not conf.enable_ipv6:
        return None
    assert conf.ipv6_subnet_min is not None
    assert conf.ipv6_subnet_max is not None
    assert conf.ipv6_subnet_len is not None
    taken = [_range(subnets.ipv6) for subnets in others if subnets.ipv6 is not None]
    had = None if previous is None else previous.ipv6
    wish = had if had is not None and _ipv6_fits(had, conf) else None
    pool = _Pool(int(conf.ipv6_subnet_min), int(conf.ipv6_subnet_max), 1 << (128 - conf.ipv6_subnet_len))
    base = pool.pick(None if wish is None else int(wish.network_address), taken, rng)
    if base is None:
        raise _exhausted(pool, taken, f"{conf.ipv6_subnet_min} and {conf.ipv6_subnet_max} (/{conf.ipv6_subnet_len})")
    return IPv6Network((base, conf.ipv6_subnet_len))


_Range = tuple[int, int]
"""First and last address, both included."""


def _range(subnet: IPv4Network | IPv6Network) -> _Range:
    first = int(subnet.network_address)
    return first, first + subnet.num_addresses - 1


@dataclass(frozen=True, slots=True)
class _Pool:
    """Subnets of `size` addresses at `first`, `first + size` .. `last`, both included."""

    first: int
    last: int
    size: int

    def pick(self, wish: int | None, taken: Sequence[_Range], rng: random.Random) -> int | None:
        """The subnet at `wish` if it is free, else a random one of the first free ones; None when all are taken."""
        if wish is not None and not any(low < wish + self.size and wish <= high for low, high in taken):
            return wish
        candidates = [base for base, _ in zip(self._free(taken), range(CANDIDATES), strict=False)]
        return rng.choice(candidates) if candidates else None

    def _free(self, taken: Sequence[_Range]) -> Iterator[int]:
        """Free subnets, ascending."""
        base = self.first
        for low, high in sorted(taken):
            while base <= self.last and base + self.size <= low:
                yield base
                base += self.size
            if high >= base:
                # On to the first boundary behind what is taken.
                base += -(-(high + 1 - base) // self.size) * self.size
        while base <= self.last:
            yield base
            base += self.size

    @property
    def n_subnets(self) -> int:
        return (self.last - self.first) // self.size + 1


def _exhausted(pool: _Pool, taken: Sequence[_Range], where: str) -> SubnetExhaustedError:
    n_inside = sum(low < pool.last + pool.size and pool.first <= high for low, high in taken)
    return SubnetExhaustedError(
        f"out of subnets: {n_inside} leases take all {pool.n_subnets} subnets between {where}; "
        "release leases that nobody uses, or widen the Network"
    )

"""Choose the subnet that this host leases.  Pure: the random numbers come from the caller.

The order is flannel's (pkg/subnet/etcd/local_manager.go, tryAcquireLease): our own lease, the subnet that we had
before, a random one of the first hundred that are free.

Four things differ, because flannel's way loses a subnet or picks a bad one in each:

* A node is PublicIP and port, so that several nodes can share an address.
* A subnet is free when it overlaps no lease.  To flannel it is free when no lease has the same key.
* The subnet that we had before is also ours when a lease with our own NodeID holds it, or one that flanneld wrote and
  that is ours by more than subnet.env (former.py).  Then we have moved to another address.
* When only one family's subnet has to change, the other family's is kept.

A reservation for us is taken, except while pods may have addresses of another lease of ours: subnet.env names its
subnet then, and a restart must not cut them off.  A reservation that is not taken stays, and its subnet is not free.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network

from udptun.config.net_conf import AddressT, NetConf, NetworkT, SubnetPool
from udptun.core.errors import SubnetExhaustedError
from udptun.core.lease import Lease, Subnets
from udptun.membership.former import FormerLease
from udptun.membership.identity import Identity
from udptun.stores.base import Chooser, SubnetChoice

CANDIDATES = 100
"""How many free subnets, ascending, the random choice is made among."""


def chooser(
    conf: NetConf, me: Identity, previous: Subnets | None, rng: random.Random, former: FormerLease | None = None
) -> Chooser:
    """How `me` picks its subnets under `conf`.

    `previous` is what subnet.env says that we had.  `former` says whether a lease of it that flanneld wrote is ours;
    None: it is not.  The chooser raises SubnetExhaustedError, with the counts, when nothing between SubnetMin and
    SubnetMax is free, and UndecidedError when `former` has to ask first.
    """

    def is_ours(lease: Lease) -> bool:
        moved = lease.attrs.node_id == me.node_id and lease.subnets == previous
        return moved or me.owns(lease)

    def choose(leases: Sequence[Lease]) -> SubnetChoice:
        # A lease at our address comes before one with our node id.  Of several, the one that we have used comes first,
        # because pods are in it, then a reservation, then one that we wrote.  After that the order is that of the keys,
        # as flannel's.
        found = [lease for lease in leases if is_ours(lease)]
        if former is not None and not any(fits(lease.subnets, conf) for lease in found):
            found += [lease for lease in leases if lease not in found and former.is_ours(lease)]
        ours = sorted(
            found,
            key=lambda it: (
                not me.owns(it),
                it.subnets != previous,
                not it.is_reservation,
                it.attrs.node_id != me.node_id,
                it.key,
            ),
        )
        kept = next((lease.subnets for lease in ours if fits(lease.subnets, conf)), None)
        drop = tuple(lease.key for lease in ours if lease.subnets != kept and not lease.is_reservation)
        if kept is not None:
            return SubnetChoice(kept, drop)
        wanted, wanted_ipv6 = (None, None) if previous is None else (previous.ipv4, previous.ipv6)
        halves = ((_is_of(conf.ipv4, it.subnets.ipv4), _is_of(conf.ipv6, it.subnets.ipv6), it) for it in ours)
        keeps, keeps_ipv6, half = next((it for it in halves if it[0] or it[1]), (False, False, None))
        if half is not None and half.is_reservation:
            # The other family alone has to change: the store reserves the new subnets instead of these.
            drop = (*drop, half.key)
            wanted = half.subnets.ipv4 if keeps else wanted
            wanted_ipv6 = half.subnets.ipv6 if keeps_ipv6 else wanted_ipv6
        others = [lease.subnets for lease in leases if lease.key not in drop]
        ipv4 = None if conf.ipv4 is None else _pick(conf.ipv4, [it.ipv4 for it in others], wanted, rng)
        ipv6 = None if conf.ipv6 is None else _pick(conf.ipv6, [it.ipv6 for it in others], wanted_ipv6, rng)
        return SubnetChoice(Subnets(ipv4, ipv6), drop)

    return choose


def left_reservations(conf: NetConf, me: Identity, leases: Iterable[Lease], own: Lease) -> list[str]:
    """A line for each reservation for `me` among `leases` beside `own`, the lease that we have, and why it is left."""
    lines = []
    for lease in sorted(leases, key=lambda it: it.key):
        if not lease.is_reservation or not me.owns(lease) or lease.subnets == own.subnets:
            continue
        if not fits(lease.subnets, conf):
            why = f"the network config of {conf.network} has no such subnet; `udptun lease release` deletes it"
        elif own.is_reservation:
            why = f"it has {own.subnet}, which is reserved too; `udptun lease release` deletes one of them"
        else:
            why = (
                f"pods may have addresses of {own.subnet}; the first start after a reboot or `udptun cleanup` takes it"
            )
        lines.append(f"{lease.subnet} is reserved for this host and is not taken: {why}")
    return lines


def fits(subnets: Subnets, conf: NetConf) -> bool:
    """Whether `conf` would hand out these subnets."""
    fits_ipv4 = subnets.ipv4 is None if conf.ipv4 is None else _is_of(conf.ipv4, subnets.ipv4)
    return fits_ipv4 and (subnets.ipv6 is None if conf.ipv6 is None else _is_of(conf.ipv6, subnets.ipv6))


def _is_of(pool: SubnetPool[NetworkT, AddressT] | None, subnet: NetworkT | None) -> bool:
    if pool is None or subnet is None:
        return False
    first, last = int(pool.subnet_min), int(pool.subnet_max)
    return subnet.prefixlen == pool.subnet_len and first <= int(subnet.network_address) <= last


def _pick(
    pool: SubnetPool[NetworkT, AddressT],
    others: Iterable[NetworkT | None],
    previous: NetworkT | None,
    rng: random.Random,
) -> NetworkT:
    """`previous` if it is of the pool and free, else a random one of the first free ones.  `others` are not free.

    Raises SubnetExhaustedError when none is free.
    """
    taken = [_range(subnet) for subnet in others if subnet is not None]
    if previous is not None and _is_of(pool, previous) and not _overlaps(_range(previous), taken):
        return previous
    candidates = [base for base, _ in zip(_free(pool, taken), range(CANDIDATES), strict=False)]
    if not candidates:
        raise _exhausted(pool, taken)
    return type(pool.network)((rng.choice(candidates), pool.subnet_len))


_Range = tuple[int, int]
"""First and last address, both included."""


def _range(subnet: IPv4Network | IPv6Network) -> _Range:
    first = int(subnet.network_address)
    return first, first + subnet.num_addresses - 1


def _overlaps(one: _Range, taken: Iterable[_Range]) -> bool:
    first, last = one
    return any(low <= last and first <= high for low, high in taken)


def _free(pool: SubnetPool[NetworkT, AddressT], taken: Iterable[_Range]) -> Iterator[int]:
    """The addresses of free subnets, ascending."""
    size, last = pool.subnet_size, int(pool.subnet_max)
    base = int(pool.subnet_min)
    for low, high in sorted(taken):
        while base <= last and base + size <= low:
            yield base
            base += size
        if high >= base:
            # Go on at the first boundary behind what is taken.
            base += -(-(high + 1 - base) // size) * size
    while base <= last:
        yield base
        base += size


def _exhausted(pool: SubnetPool[NetworkT, AddressT], taken: Iterable[_Range]) -> SubnetExhaustedError:
    first, last, size = int(pool.subnet_min), int(pool.subnet_max), pool.subnet_size
    n_inside = sum(low < last + size and first <= high for low, high in taken)
    return SubnetExhaustedError(
        f"out of subnets: {n_inside} leases take all {(last - first) // size + 1} subnets between {pool.subnet_min} "
        f"and {pool.subnet_max} (/{pool.subnet_len}); release leases that nobody uses, or widen the Network"
    )

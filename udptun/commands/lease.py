"""`udptun lease list|show|reserve|release`: an operator's view of the store, of any kind."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Network

from udptun.backends.choice import parse_net_conf
from udptun.backends.udp import UdpKeys
from udptun.commands.figures import duration
from udptun.config.command_flags import LeaseRequest
from udptun.config.store_flags import StoreKind
from udptun.core.errors import UdptunError, UsageError, one_line
from udptun.core.family import Family
from udptun.core.ip_text import ipv6_network
from udptun.core.lease import Lease, LeaseAttrs, LeaseFormatError, Subnets
from udptun.membership.allocate import fits
from udptun.membership.identity import Identity
from udptun.stores.base import Snapshot, Store
from udptun.stores.open import open_store

SCHEMA = 1
"""Of what --json prints: keys are only ever added."""


def list_leases(request: LeaseRequest) -> int:
    """Print every lease in the store.  Items that are no leases go to stderr."""

    async def work(store: Store) -> None:
        snapshot = await store.snapshot(exact=True)
        if request.json:
            leases = [_to_json(lease) for lease in _sorted(snapshot)]
            document = {"schema": SCHEMA, "store": store.name, "leases": leases, "skipped": list(snapshot.skipped)}
            print(json.dumps(document))
            return
        rows = [
            [
                _subnets(lease),
                str(lease.attrs.host_address),
                one_line((lease.attrs.node_id or "-")[:8]),
                one_line(lease.attrs.backend_type or "-"),
                str(lease.attrs.port(0) or "-"),
                _expiry(lease),
            ]
            for lease in _sorted(snapshot)
        ]
        print("\n".join(_table(["SUBNET", "PUBLIC IP", "NODE", "BACKEND", "PORT", "EXPIRES"], rows)))
        for line in snapshot.skipped:
            print(f"skipped: {line}", file=sys.stderr)

    return _with_store(request, work)


def show(request: LeaseRequest) -> int:
    """Print all of one lease, named by its subnet or key."""
    wanted = _subnets_of(*request.words)

    async def work(store: Store) -> None:
        lease = _find(await store.snapshot(exact=True), wanted, store)
        if request.json:
            print(json.dumps({"schema": SCHEMA, "store": store.name, **_to_json(lease)}))
            return
        attrs = lease.attrs
        lines = {
            "subnet": _subnets(lease),
            "key": lease.key,
            "public IP": " ".join(str(ip) for ip in (attrs.public_ip, attrs.public_ipv6) if ip is not None),
            "port": str(attrs.port(0) or "not named: Backend.Port"),
            "node": one_line(attrs.node_id or "not named"),
            "backend": one_line(attrs.backend_type or "not named"),
            "expires": _expiry(lease),
            "revision": str(lease.revision),
            "value": attrs.to_json(),
        }
        print("\n".join(f"{name:<10} {value}" for name, value in lines.items()))

    return _with_store(request, work)


def reserve(request: LeaseRequest) -> int:
    """Keep a subnet for the node with --public-ip or --public-ipv6."""
    (word,) = request.words
    subnets = _subnets_of(word)
    public_ip, public_ipv6 = request.options.public_ip, request.options.public_ipv6
    if public_ip is None and public_ipv6 is None:
        raise UsageError("lease reserve: --public-ip or --public-ipv6 is missing: for which host is the subnet?")
    port = request.options.port
    attrs = LeaseAttrs(public_ip, public_ipv6, backend_data=None if port is None else {"Port": port})

    async def work(store: Store) -> None:
        conf = parse_net_conf(await store.network_config(), store.config_name)
        if not fits(subnets, conf):
            pool = conf.pool(conf.families[0])
            also = conf.ipv4 is not None and conf.ipv6 is not None
            raise UdptunError(
                f"cannot reserve {word}: no host would take it; the subnets of {conf.network} are those of length "
                f"/{pool.subnet_len} from {pool.subnet_min} to {pool.subnet_max}"
                + (f", each with one of {conf.pool(Family.IPV6).network} behind an & in the key" if also else "")
            )
        if subnets.ipv4 is None and not store.keeps_ipv6_alone:
            raise UdptunError(
                f"cannot reserve {word} in {store.name}: its leases begin with an IPv4 subnet; "
                "the store `local`, `file` or `kube` has those of IPv6 alone"
            )
        lease = await store.reserve(subnets, attrs)
        held = f", which node {one_line(lease.attrs.node_id)} holds" if lease.attrs.node_id else ""
        default_port = conf.backend.port if isinstance(conf.backend, UdpKeys) else None
        host = Identity(public_ip, port or default_port, "", default_port, "", public_ipv6)
        others = [other for other in (await store.snapshot()).leases if host.owns(other) and other.key != lease.key]
        print(
            f"reserved {lease.subnet} for {lease.attrs.host_address} in {store.name}{held}; it does not expire, and "
            f"takes effect {_when(lease, others)}"
        )

    return _with_store(request, work)


def _when(reserved: Lease, others: Sequence[Lease]) -> str:
    """When the host has `reserved`; `others` are its other leases."""
    if reserved.attrs.node_id or reserved.attrs.backend_type:
        return "now: the host has it"
    if not others:
        return "when the daemon there starts"
    (now, *_) = others
    if not now.attrs.is_udptun:
        return f"when {now.subnet}, which flanneld has there, is released while flanneld is stopped"
    return (
        f"at the first start of the daemon there after a reboot or `udptun cleanup`: until then the host goes on with "
        f"{now.subnet}, of which its pods may have addresses"
    )


def release(request: LeaseRequest) -> int:
    """Delete a lease or a reservation, of any host."""
    wanted = _subnets_of(*request.words)

    async def work(store: Store) -> None:
        lease = _find(await store.snapshot(), wanted, store)
        await store.delete(lease)
        kind = "reservation" if lease.is_reservation else "lease"
        print(
            f"released the {kind} {lease.subnet} of {lease.attrs.host_address} in {store.name}; "
            "a daemon that runs with it takes it again"
        )

    return _with_store(request, work)


def _with_store(request: LeaseRequest, work: Callable[[Store], Awaitable[None]]) -> int:
    options = request.options
    if options.store.kind is StoreKind.LOCAL and not options.store.path.exists():
        # Opening it would create it.
        raise UdptunError(f"there is no lease store {options.store}; name another with --store or the --etcd-* flags")

    async def main() -> None:
        store = open_store(options)
        try:
            await work(store)
        finally:
            await store.aclose()

    asyncio.run(main())
    return 0


def _subnets_of(word: str) -> Subnets:
    """What `10.244.3.0/24` or a key means.  Raises UsageError."""
    try:
        if "-" in word:
            return Subnets.from_key(word)
        return Subnets(None, ipv6_network(word)) if ":" in word else Subnets(IPv4Network(word))
    except (LeaseFormatError, ValueError) as exc:
        raise UsageError(f"{word!r} is neither a subnet as 10.244.3.0/24 nor a key as 10.244.3.0-24: {exc}") from exc


def _find(snapshot: Snapshot, wanted: Subnets, store: Store) -> Lease:
    for lease in snapshot.leases:
        there = lease.subnets
        # A person may name one of two subnets.
        if wanted in (there, Subnets(there.ipv4), Subnets(None, there.ipv6)):
            return lease
    unusable = next((f"; skipped: {line}" for line in snapshot.skipped if wanted.key in line), "")
    raise UdptunError(f"there is no lease {wanted.first} in {store.name}{unusable}")


def _sorted(snapshot: Snapshot) -> list[Lease]:
    def place(lease: Lease) -> tuple[int, int, int]:
        return lease.subnet.version, int(lease.subnet.network_address), lease.subnet.prefixlen

    return sorted(snapshot.leases, key=place)


def _subnets(lease: Lease) -> str:
    return " ".join(str(subnet) for subnet in (lease.subnets.ipv4, lease.subnets.ipv6) if subnet is not None)


def _expiry(lease: Lease) -> str:
    if lease.expires_s is None:
        return "never"
    left_s = lease.expires_s - time.time()
    return f"in {duration(left_s)}" if left_s > 0 else "now"


def _to_json(lease: Lease) -> dict[str, object]:
    attrs = lease.attrs
    return {
        "key": lease.key,
        "subnet": str(lease.subnet),
        "ipv6_subnet": None if lease.subnets.ipv6 is None else str(lease.subnets.ipv6),
        "public_ip": None if attrs.public_ip is None else str(attrs.public_ip),
        "public_ipv6": None if attrs.public_ipv6 is None else str(attrs.public_ipv6),
        "port": attrs.port(0) or None,
        "node_id": attrs.node_id,
        "backend_type": attrs.backend_type,
        "udptun": attrs.is_udptun,
        "expires_at": lease.expires_s,
        "revision": lease.revision,
        "value": json.loads(attrs.to_json()),
    }


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines with columns as wide as their widest cell.  The first four columns are words, the others numbers."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]

"""The status document: what `udptun status --json` prints (docs/status.md has its keys)."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from udptun import __version__
from udptun.control.forwarding import Forwarding
from udptun.control.running import Running
from udptun.core.errors import KernelError
from udptun.core.family import Family
from udptun.core.lease import Lease, LeasePart
from udptun.core.lease_table import LeaseTable
from udptun.kernel.device_counters import read_device_counters
from udptun.kernel.process_usage import usage_of
from udptun.kernel.reconcile.change import OBJECTS

log = logging.getLogger(__name__)

SCHEMA = 1
"""Of the status document.  Keys are only ever added."""


def document(running: Running, uptime_s: float, keys: Collection[str] | None = None) -> dict[str, Any]:
    """What docs/status.md describes; with `keys` only the peers whose leases have these.

    This runs in a thread beside the event loop.  What the loop may change meanwhile is copied in one step, as by `list`
    of a view.
    """
    own, me, underlay = running.membership.own, running.me, running.underlay
    leases, parts = _peers(running.membership.table, keys)
    usage = usage_of(os.getpid())
    return {
        "schema": SCHEMA,
        "version": __version__,
        "pid": os.getpid(),
        "uptime_s": round(uptime_s, 1),
        "cpu_s": usage and usage.cpu_s,
        "memory_bytes": usage and usage.memory_bytes,
        "store": str(running.options.store),
        "store_answers": running.membership.store_answers,
        "store_answered_at": running.membership.store_answered_s,
        "network": str(running.conf.network),
        "lease": {
            "subnet": str(own.subnet),
            "public_ip": str(own.attrs.host_address),
            "port": me.port,
            "node_id": me.node_id,
            "expires_at": own.expires_s,
        },
        "underlay": {"interface": underlay.link_name, "address": str(underlay.first_address), "mtu": underlay.mtu},
        "ipv6": _ipv6(running, keys),
        **_carrying(running.forwarding, leases, parts),
        "firewall": running.firewall.document(),
        "other_types": [
            {
                "subnet": str(lease.subnet),
                "public_ip": str(lease.attrs.host_address),
                "backend_type": lease.attrs.backend_type,
            }
            for lease in running.membership.of_other_type
        ],
        "skipped": list(running.membership.skipped),
        "problems": running.problems,
    }


def _peers(table: LeaseTable, keys: Collection[str] | None) -> tuple[list[Lease], list[LeasePart]]:
    """The leases of the peers in the order of their subnets, and what each says of the table's family."""
    leases = [lease for lease in list(table.peers.values()) if keys is None or lease.key in keys]
    leases.sort(key=lambda lease: int(lease.subnet_of(table.family).network_address))
    return leases, [*map(table.part, leases)]


def _carrying(forwarding: Forwarding, leases: Sequence[Lease], parts: Sequence[LeasePart]) -> dict[str, Any]:
    """The keys about carrying packets.

    `leases` are the peers' by the first family, in the order to show them in, and `parts` what each says of it.
    """
    first = forwarding.families[0]
    backend = {
        "type": forwarding.backend.type,
        "reason": forwarding.reason,
        "device": forwarding.device(first),
        "mtu": forwarding.live.mtu,
    }
    common = {"devices": device_documents(forwarding), "changes": _changes(forwarding)}
    peers = [_peer(lease, part) for lease, part in zip(leases, parts, strict=True)]
    if (probes := forwarding.probes.get(first)) is not None:
        backend |= {"probes": probes.state}
        peers = [peer | probes.document(lease) for peer, lease in zip(peers, leases, strict=True)]
    tunnel = forwarding.tunnel_of(first)
    if tunnel is None:
        return {"backend": backend, "datapath": None, **common, "peers": peers, "counters": {}}
    own = tunnel.document(forwarding.live)
    known = tunnel.peer_documents([part.subnet for part in parts], leases)
    return {
        "backend": backend | own["backend"],
        "datapath": own["datapath"],
        **common,
        "peers": [peer | more for peer, more in zip(peers, known, strict=True)],
        "counters": own["counters"],
    }


def device_documents(forwarding: Forwarding) -> list[dict[str, Any]]:
    names = sorted({name for family in forwarding.families if (name := forwarding.device(family)) is not None})
    try:
        counters = read_device_counters(names)
    except KernelError as exc:
        # All else of the status is known.
        log.debug("no counters of devices error=%r", str(exc))
        return []
    return [{"name": name, **asdict(it)} for name in names if (it := counters.get(name)) is not None]


def _changes(forwarding: Forwarding) -> list[dict[str, Any]]:
    return [
        {
            "family": f"ipv{routing.family.value}",
            "object": thing,
            "desired": routing.changes.get((thing, False), 0),
            "repairs": routing.changes.get((thing, True), 0),
        }
        for routing in forwarding.routings
        for thing in sorted(set(OBJECTS.values()))
    ]


def _peer(lease: Lease, part: LeasePart) -> dict[str, Any]:
    return {
        "subnet": str(part.subnet),
        "ipv6_subnet": None if lease.subnets.ipv6 is None else str(lease.subnets.ipv6),
        "public_ip": str(part.public_ip),
        "port": lease.attrs.port(0) or None,
        "udptun": lease.attrs.is_udptun,
        "expires_at": lease.expires_s,
    }


def _ipv6(running: Running, keys: Collection[str] | None) -> dict[str, object] | None:
    """The key `ipv6`: None where the configuration does not enable it."""
    pool, own, forwarding = running.conf.ipv6, running.membership.own, running.forwarding
    if pool is None:
        return None
    table = next((it for it in running.membership.tables if it.family is Family.IPV6), None)
    leases, parts = ([], []) if table is None else _peers(table, keys)
    address = running.underlay.ipv6
    return {
        "network": str(pool.network),
        "subnet": None if own.subnets.ipv6 is None else str(own.subnets.ipv6),
        "public_ip": None if own.attrs.public_ipv6 is None else str(own.attrs.public_ipv6),
        "address": None if address is None else str(address),
        "device": forwarding.ipv6_device,
        "mtu": forwarding.live.ipv6_mtu,
        **_ipv6_datapath(forwarding),
        "peers": [
            {"subnet": str(part.subnet), "public_ip": str(part.public_ip), **more}
            for part, more in zip(parts, _ipv6_peers(forwarding, leases), strict=True)
        ],
    }


def _ipv6_datapath(forwarding: Forwarding) -> dict[str, Any]:
    """Of the datapath that IPv6 has beside that of IPv4."""
    tunnel = forwarding.tunnel_of(Family.IPV6)
    if tunnel is None or tunnel is forwarding.tunnel_of(forwarding.families[0]):
        return {"datapath": None, "counters": {}}
    own = tunnel.document(forwarding.live)
    return {"datapath": own["datapath"], "counters": own["counters"]}


def _ipv6_peers(forwarding: Forwarding, leases: Sequence[Lease]) -> list[dict[str, Any]]:
    """What is known of these peers by IPv6 beside their leases."""
    tunnel = forwarding.tunnel_of(Family.IPV6)
    if tunnel is None:
        probes = forwarding.probes.get(Family.IPV6)
        return [{} if probes is None else probes.document(lease) for lease in leases]
    return tunnel.peer_documents([lease.subnet_of(Family.IPV6) for lease in leases], leases)

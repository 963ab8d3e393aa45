"""What this host says of its peers to the others, a JSON document that docs/mesh.md describes.

It has nothing that the status document does not have.
"""

from __future__ import annotations

import time
from typing import Any

from udptun import __version__
from udptun.backends.udp import UdpKeys
from udptun.control.document import document
from udptun.control.running import Running
from udptun.core.mesh import FOUND, MOST_PEERS, SCHEMA
from udptun.core.tunnel import device_mtu_to
from udptun.probing.liveness import Liveness


def view(running: Running) -> dict[str, Any]:
    """Of this moment, for a thread beside the event loop.  Of more than MOST_PEERS peers these, dead ones first."""
    leases = {lease.key: lease for table in running.membership.tables for lease in list(table.peers.values())}
    chosen = sorted(leases.values(), key=lambda lease: (int(lease.subnet.network_address), lease.key))
    if len(chosen) > MOST_PEERS:
        liveness = running.forwarding.liveness
        # Of equals the order stays.
        chosen.sort(key=lambda lease: liveness(lease) is not Liveness.DEAD)
    status = document(running, 0.0, {lease.key for lease in chosen[:MOST_PEERS]})
    own, ipv6 = running.membership.own, status["ipv6"] or {}
    return {
        "schema": SCHEMA,
        "version": __version__,
        "made_at": round(time.time(), 3),
        "subnet": status["lease"]["subnet"],
        "ipv6_subnet": None if own.subnets.ipv6 is None else str(own.subnets.ipv6),
        "public_ip": status["lease"]["public_ip"],
        "backend": status["backend"]["type"],
        "mtu": status["backend"]["mtu"],
        "probes": status["backend"].get("probes", "off"),
        "mesh_port": running.options.mesh_port,
        "n_peers": len(leases),
        "peers": _peers(status, ipv6),
    }


def _peers(status: dict[str, Any], ipv6: dict[str, Any]) -> list[dict[str, Any]]:
    mtu, here = status["backend"]["mtu"], status["underlay"]["address"]
    by_subnet = {part["subnet"]: part for part in ipv6.get("peers", ())}
    found = []
    for peer in status["peers"]:
        # Where IPv6 is alone, `peers` has it too.
        by_subnet.pop(peer["subnet"], None)
        twin = by_subnet.pop(peer["ipv6_subnet"], None)
        # In Type udp both families go one way, and what is known is of both.
        if status["backend"]["type"] == UdpKeys.type:
            twin = None
        found.append(
            {
                **{key: peer[key] for key in ("subnet", "ipv6_subnet", "public_ip", "udptun")},
                **_found(peer, device_mtu_to(peer["public_ip"], here, mtu)),
                "ipv6": None if twin is None else _found(twin, ipv6["mtu"]),
            }
        )
    for subnet, part in by_subnet.items():
        # Of its lease this host cannot use what it says of IPv4.
        known = {"subnet": subnet, "ipv6_subnet": subnet, "public_ip": part["public_ip"], "udptun": True}
        found.append({**known, **_found(part, ipv6["mtu"]), "ipv6": None})
    return found


def _found(part: dict[str, Any], mtu: int) -> dict[str, Any]:
    """What probes have found out.  `mtu`: how long packets may be by the device, bytes."""
    return {**{key: part.get(key) for key in FOUND}, "mtu": mtu}

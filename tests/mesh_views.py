"""Views of hosts that see each other, as their daemons would give them, with faults as a test wants them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

from udptun.commands.mesh.answer import View, read_view
from udptun.commands.mesh.ask import Answer
from udptun.commands.mesh.matrix import Mesh, build, choose

NOW_S = 1_700_000_000.0
PORT = 8286
MTU = 1472

Fault = Callable[[int, int, dict[str, Any]], None]
"""Is given the numbers of a way's hosts and what the first one says of it, to change that."""


def subnet_of(number: int) -> str:
    return f"10.244.{number}.0/24"


def address_of(number: int) -> str:
    return f"192.0.2.{number}"


def peer(number: int, **more: Any) -> dict[str, Any]:
    """A host as another one says that it sees it."""
    found = {"liveness": "alive", "rtt_ms": 0.25, "rtt_age_s": 12.0, "path_mtu": MTU, "mtu": MTU}
    counts = {"probes_sent": 4, "probes_lost": 0}
    who = {"subnet": subnet_of(number), "ipv6_subnet": None, "public_ip": address_of(number), "udptun": True}
    return {**who, **found, **counts, "ipv6": None, **more}


def document(number: int, n_hosts: int, fault: Fault | None = None, **more: Any) -> dict[str, Any]:
    """The view of one of `n_hosts` hosts.  Times between two hosts are the same in each run."""
    peers = []
    for other in range(1, n_hosts + 1):
        if other != number:
            chance = (7919 * min(number, other) + 104_729 * max(number, other)) % 1000 / 1000
            is_near = number // 20 == other // 20
            said = peer(other, rtt_ms=round(0.05 + 0.2 * chance + (0 if is_near else 2 * chance**2), 3))
            if fault is not None:
                fault(number, other, said)
            peers.append(said)
    return {
        "schema": 1,
        "version": "0.1.0",
        "made_at": NOW_S,
        "subnet": subnet_of(number),
        "ipv6_subnet": None,
        "public_ip": address_of(number),
        "backend": "udp",
        "mtu": MTU,
        "probes": "on",
        "mesh_port": PORT,
        "n_peers": n_hosts - 1,
        "peers": peers,
        **more,
    }


def view(number: int, n_hosts: int, fault: Fault | None = None) -> View:
    return read_view(json.dumps(document(number, n_hosts, fault)).encode())


def mesh(n_hosts: int, fault: Fault | None = None, silent: Collection[int] = ()) -> Mesh:
    """As host 1 sees it.  The `silent` ones have closed ports, but where `fault` makes a host flannel's."""
    own = view(1, n_hosts, fault)
    peers = choose(own)
    answers = {}
    for it in peers:
        number = int(str(it.subnet).split(".")[2])
        if not it.is_udptun:
            continue
        said = number not in silent
        answers[it.subnet] = Answer(view(number, n_hosts, fault) if said else None, "" if said else "closed", 0.003)
    return build(own, peers, answers, made_at=NOW_S, took_s=0.04, port=PORT)


def change(said: dict[str, Any], liveness: str) -> None:
    """Of a host that is not alive."""
    said["liveness"] = liveness
    if liveness == "unknown":
        said.update(rtt_ms=None, rtt_age_s=None, path_mtu=None, probes_sent=0)
    else:
        said.update(rtt_age_s=95.0, probes_sent=0)

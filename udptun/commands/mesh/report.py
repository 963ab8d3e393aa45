"""A mesh as a JSON document, which docs/mesh.md describes.  Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from udptun.commands.mesh.matrix import Host, Mesh, Way
from udptun.commands.mesh.problems import Problem

SCHEMA = 1
"""Keys are only ever added."""


def as_json(mesh: Mesh, problems: Sequence[Problem], notes: Sequence[str]) -> str:
    document = {
        "schema": SCHEMA,
        "made_at": round(mesh.made_at, 3),
        "took_s": round(mesh.took_s, 3),
        "port": mesh.port,
        "hosts_left_out": mesh.n_left_out,
        "hosts": [_host(host) for host in mesh.hosts],
        "ways": [
            _way(start, end, way) for start in mesh.viewers for end in mesh.hosts if (way := mesh.way(start, end))
        ],
        "problems": [{"kind": it.kind.value, "hosts": list(it.hosts), "text": it.text} for it in problems],
        "notes": list(notes),
    }
    return json.dumps(document)


def _host(host: Host) -> dict[str, Any]:
    view = host.view
    return {
        "number": host.number,
        "subnet": str(host.subnet),
        "ipv6_subnet": None if host.ipv6_subnet is None else str(host.ipv6_subnet),
        "public_ip": str(host.public_ip),
        "udptun": host.is_udptun,
        "self": host.is_self,
        "view": None
        if view is None
        else {
            "version": view.version,
            "backend": view.backend,
            "mtu": view.mtu,
            "made_at": view.made_at,
            "took_s": round(host.took_s, 4),
        },
        "reason": host.reason or None,
    }


def _way(start: Host, end: Host, way: Way) -> dict[str, Any]:
    known = asdict(way.found)
    del known["liveness"]
    return {"from": start.number, "to": end.number, "state": way.state.value, "family": way.family or None, **known}

"""Where packets pass on this host as the backend carries them, for those who look what is in their way.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from udptun.backends.base import Backend, BackendInput, device_of
from udptun.backends.udp import Udp
from udptun.core.family import Family
from udptun.core.network_state import IPAddress
from udptun.core.pod_path import PodPath
from udptun.core.tunnel_path import TunnelPath

MAX_PEERS = 100
"""The addresses of so many peers are looked at."""


def pod_path(backend: Backend, inputs: BackendInput) -> PodPath | None:
    """Where packets between the pods here and those of other hosts pass; None: nowhere that we know of."""
    device = device_of(backend, inputs.underlay, inputs.live, inputs.family)
    if device is None:
        one_peer = replace(inputs, peers=tuple(islice(inputs.peers, 1)))
        device = inputs.underlay.link_name if backend.desired(one_peer).routes else None
    return None if device is None else PodPath(inputs.network, inputs.own_subnet, device)


def tunnel_paths(backend: Backend, inputs: Sequence[BackendInput]) -> list[TunnelPath]:
    """Where the tunnel's own datagrams pass, by each family of the underlay; `inputs` are of each family of the pods.

    None with DirectRouting: there may be none then, as peers may be reached without the tunnel.
    """
    if backend.ports is None or backend.asks_direct:
        return []
    own_port, default_port = backend.ports
    ports: dict[Family, dict[IPAddress, int]] = {}
    for it in inputs:
        for lease in islice(it.peers, MAX_PEERS):
            outer = backend.outer(lease.attrs, it.family)
            if (address := lease.attrs.address(outer)) is not None:
                ports.setdefault(outer, {})[address] = lease.attrs.port(default_port)
    found = []
    for family, port_of in ports.items():
        underlay = inputs[0].underlay
        if (own := underlay.address_of(family)) is None:
            continue
        path = TunnelPath.to_peers(underlay.link_name, own, own_port, port_of.items(), backend.type == Udp.type)
        found.append(path)
    return found

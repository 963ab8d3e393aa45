"""Register nodes of hosts that do not exist at an API server of the lab, as large as real ones.

    python bulk_nodes.py HOST:PORT NETWORK N

Runs where the server can be reached, and needs nothing but the standard library.
"""

from __future__ import annotations

import http.client
import json
import sys
from ipaddress import IPv4Address, IPv4Network

_FIRST_PUBLIC_IP = IPv4Address("198.18.0.0")
"""As in bulk_leases.py."""

_PREFIX = "flannel.alpha.coreos.com/"
_IMAGES = [
    {"names": [f"registry.example/library/image@sha256:{number:064x}"], "sizeBytes": 1_000_000 * number}
    for number in range(1, 51)
]
"""kubelet reports 50 at most (--node-status-max-images)."""
_CONDITIONS = [
    {
        "type": kind,
        "status": "False",
        "lastHeartbeatTime": "2026-11-28T00:00:00Z",
        "lastTransitionTime": "2026-11-28T00:00:00Z",
        "reason": f"KubeletHas{kind}",
        "message": f"kubelet has said something of {kind}",
    }
    for kind in ("MemoryPressure", "DiskPressure", "PIDPressure", "Ready")
]
_FIELDS: dict[str, object] = {
    f"f:{area}": {f"f:field-{number}": {".": {}, "f:lastHeartbeatTime": {}, "f:value": {}} for number in range(5)}
    for area in ("metadata", "spec", "status")
}


def node(name: str, subnet: IPv4Network, public_ip: IPv4Address) -> dict[str, object]:
    """A node of 10 kB whose daemon, of Type udp, publishes `public_ip`."""
    annotations = {
        f"{_PREFIX}backend-data": json.dumps({"Port": 8285, "NodeID": f"{int(public_ip):032x}", "Udptun": 1}),
        f"{_PREFIX}backend-type": "udp",
        f"{_PREFIX}kube-subnet-manager": "true",
        f"{_PREFIX}public-ip": str(public_ip),
        "node.alpha.kubernetes.io/ttl": "0",
    }
    managers = [
        {"manager": manager, "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": _FIELDS}
        for manager in ("kubelet", "kube-controller-manager")
    ]
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {"name": name, "annotations": annotations, "managedFields": managers},
        "spec": {"podCIDR": str(subnet), "podCIDRs": [str(subnet)]},
        "status": {"conditions": _CONDITIONS, "images": _IMAGES},
    }


def nodes(network: IPv4Network, n: int) -> list[dict[str, object]]:
    """`peer-2` to `peer-N+1`, each with the /24 of its number."""
    return [
        node(
            f"peer-{number}",
            IPv4Network((int(network.network_address) + (number << 8), 24)),
            _FIRST_PUBLIC_IP + number,
        )
        for number in range(2, n + 2)
    ]


def register(server: str, network: IPv4Network, n: int) -> None:
    connection = http.client.HTTPConnection(server, timeout=60)
    for each in nodes(network, n):
        connection.request("POST", "/api/v1/nodes", json.dumps(each), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        said = answer.read()
        if answer.status != http.client.CREATED:
            raise SystemExit(f"the API server answers {answer.status} {said[:200]!r}")
    connection.close()


if __name__ == "__main__":
    register(sys.argv[1], IPv4Network(sys.argv[2]), int(sys.argv[3]))

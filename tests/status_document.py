"""A status document of a node with one peer, as docs/status.md describes it."""

from __future__ import annotations

from typing import Any

NOW_S = 1_700_000_000.0

DOCUMENT: dict[str, Any] = {
    "schema": 1,
    "version": "0.1.0",
    "pid": 10,
    "uptime_s": 59.9,
    "store": "local:/var/lib/udptun/leases.db",
    "network": "10.244.0.0/16",
    "lease": {
        "subnet": "10.244.1.0/24",
        "public_ip": "192.0.2.1",
        "port": 8285,
        "node_id": "1" * 32,
        "expires_at": NOW_S + 7265,
    },
    "underlay": {"interface": "eth0", "address": "192.0.2.1", "mtu": 1500},
    "backend": {"type": "udp", "reason": "as configured", "device": "flannel0", "mtu": 1472, "source_check": "peer"},
    "datapath": {
        "pid": 11,
        "uptime_s": 3600.5,
        "started_at": NOW_S - 3600.5,
        "standby_pids": [12, 13],
        "confinement": "full",
        "workers": ["running", "tun_lost"],
    },
    "peers": [
        {
            "subnet": "10.244.2.0/24",
            "public_ip": "192.0.2.2",
            "port": 9000,
            "udptun": False,
            "expires_at": None,
            "liveness": "alive",
            "rtt_ms": 0.25,
            "path_mtu": None,
            "encap_packets": 1234567,
            "encap_bytes": 2,
            "decap_packets": 3,
            "decap_bytes": 4,
        }
    ],
    "firewall": {"form": "iptables", "masquerade": True, "forward": True},
    "skipped": ["junk: not JSON"],
    "counters": {"encap_packets": 9, "encap_drop_ttl": 0, "decap_drop_unknown_peer": 7},
    "problems": ["route x is not ours"],
}

"""Put leases of hosts that do not exist into a local store's database, all at once.

    python bulk_leases.py DATABASE NETWORK N [IPV6-NETWORK]

Leases of an earlier call are removed first; leases that daemons hold stay.  Runs where the database's directory is, and
needs nothing but the standard library.  Prints a key that was there before and is gone, or `-`, and the last one that
is there now, or `-`.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

FIRST_PUBLIC_IP = IPv4Address("198.18.0.0")
"""The first of 131,072 addresses that are set aside for benchmarks (RFC 2544).  No host of a lab has one of them."""


def put(
    database: sqlite3.Connection, network: IPv4Network, n: int, ipv6_network: IPv6Network | None = None
) -> tuple[str | None, str | None]:
    """`ipv6_network`: each lease has a /64 of it too, and its host takes IPv6.

    Returns a key that is gone, and the last one that is there, in the order of addresses.
    """
    public_ips = [str(FIRST_PUBLIC_IP + i) for i in range(n)]
    data = {} if ipv6_network is None else {"BackendData": {"Udptun": 1, "IPv6": True}}
    values = [json.dumps({"PublicIP": ip, "BackendType": "udp", **data}) for ip in public_ips]
    with database:
        ours = "from leases where value like '%198.18.%' or value like '%198.19.%'"
        before = [key for (key,) in database.execute(f"select key {ours} order by rowid")]
        database.execute(f"delete {ours}")
        taken = {half for (key,) in database.execute("select key from leases") for half in key.split("&")}
        free = [(key for key in _keys(it) if key not in taken) for it in (network, ipv6_network) if it is not None]
        expires = time.time() + 86_400
        rows = [("&".join(map(next, free)), value, expires) for value in values]
        database.executemany("insert into leases (key, value, expires) values (?, ?, ?)", rows)
    return (before[-1] if len(before) > n else None), (rows[-1][0] if rows else None)


def _keys(network: IPv4Network | IPv6Network) -> Iterator[str]:
    """All /24 or /64 of `network`, as halves of a lease's key."""
    address, length = (IPv4Address, 24) if network.version == 4 else (IPv6Address, 64)
    first, shift = int(network.network_address), network.max_prefixlen - length
    return (f"{address(first + (i << shift))}-{length}" for i in range(network.num_addresses >> shift))


if __name__ == "__main__":
    connection = sqlite3.connect(sys.argv[1], timeout=60)
    keys = put(connection, IPv4Network(sys.argv[2]), int(sys.argv[3]), *map(IPv6Network, sys.argv[4:]))
    print(*(key or "-" for key in keys))
    connection.close()

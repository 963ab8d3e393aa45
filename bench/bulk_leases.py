"""Put leases of hosts that do not exist into a local store's database, all at once.

    python bulk_leases.py DATABASE NETWORK N

Leases of an earlier call are removed first; leases that daemons hold stay.  Runs where the database's directory is, and
needs nothing but the standard library.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from ipaddress import IPv4Address, IPv4Network

FIRST_PUBLIC_IP = IPv4Address("198.18.0.0")
"""The first of 131,072 addresses that are set aside for benchmarks (RFC 2544).  No host of a lab has one of them."""


def put(database: sqlite3.Connection, network: IPv4Network, n: int) -> None:
    public_ips = [str(FIRST_PUBLIC_IP + i) for i in range(n)]
    values = [json.dumps({"PublicIP": ip, "BackendType": "udp"}) for ip in public_ips]
    with database:
        database.execute("delete from leases where value like '%198.18.%' or value like '%198.19.%'")
        taken = {key for (key,) in database.execute("select key from leases")}
        first = int(network.network_address)
        keys = (f"{IPv4Address(first + (i << 8))}-24" for i in range(network.num_addresses >> 8))
        free = (key for key in keys if key not in taken)
        expires = time.time() + 86_400
        rows = [(next(free), value, expires) for value in values]
        database.executemany("insert into leases (key, value, expires) values (?, ?, ?)", rows)


if __name__ == "__main__":
    connection = sqlite3.connect(sys.argv[1], timeout=60)
    put(connection, IPv4Network(sys.argv[2]), int(sys.argv[3]))
    connection.close()

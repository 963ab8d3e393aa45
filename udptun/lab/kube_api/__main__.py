"""`python -m udptun.lab.kube_api ADDRESS PORT`: serve until standard input ends.

Each line of it, `NAME SUBNET`, registers a node as kubelet does and gives it a podCIDR as the controller manager does.
Prints a line when it serves, and one for each node.
"""

from __future__ import annotations

import socket
import sys

from udptun.lab.kube_api.cluster import Cluster
from udptun.lab.kube_api.server import ApiServer


def main() -> None:
    address, port = sys.argv[1:]
    with ApiServer(listen=lambda: socket.create_server((address, int(port)))) as server:
        print("ready", flush=True)
        for line in sys.stdin:
            name, subnet = line.split()

            def add(cluster: Cluster, name: str = name, subnet: str = subnet) -> None:
                cluster.add_node(name, subnet)

            server.do(add)
            print(name, flush=True)


if __name__ == "__main__":
    main()

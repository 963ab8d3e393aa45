"""`python -m udptun.lab.kube_api ADDRESS PORT`: serve until standard input ends.

Each line of it, `NAME SUBNET[,SUBNET]`, registers a node as kubelet does and gives it podCIDRs as the controller
manager does.
Prints a line when it serves, and one for each node.
"""

from __future__ import annotations

import socket
import sys

from udptun.lab.kube_api.cluster import Cluster
from udptun.lab.kube_api.server import ApiServer


def main() -> None:
    address, port = sys.argv[1:]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with ApiServer(listen=lambda: socket.create_server((address, int(port)), family=family)) as server:
        print("ready", flush=True)
        for line in sys.stdin:
            name, subnets = line.split()

            def add(cluster: Cluster, name: str = name, subnets: str = subnets) -> None:
                cluster.add_node(name, subnets)

            server.do(add)
            print(name, flush=True)


if __name__ == "__main__":
    main()

"""What flanneld does on a node with "Type": "vxlan" and its Kubernetes subnet manager, in a few lines of Python.

    python -I -S flannel_stand_in.py API-URL NODE ADDRESS MTU

Its own node gets flannel's annotations.  flannel.1, and a neighbour, an fdb entry and a route for each other node, are
set up by `ip` and `bridge`; a device that is there is used again.  As with flanneld, a node of another type is passed
over, and what was set up for it before stays.  Nothing is removed at the end.
"""

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PREFIX = "flannel.alpha.coreos.com/"
DEVICE = Path("/sys/class/net/flannel.1")
url, name, address, mtu = sys.argv[1:]


def ask(path: str, patch: object = None) -> dict:
    data = None if patch is None else json.dumps(patch).encode()
    kind = {"Content-Type": "application/strategic-merge-patch+json"}
    request = urllib.request.Request(f"{url}/api/v1/{path}", data, kind, method="PATCH" if data else "GET")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def run(*lines: str) -> None:
    for line in lines:
        subprocess.run(line.split(), check=True)


def annotations(node: dict) -> dict:
    found = node["metadata"].get("annotations", {})
    return {key.removeprefix(PREFIX): value for key, value in found.items() if key.startswith(PREFIX)}


def set_up() -> None:
    node = ask(f"nodes/{name}")
    subnet = node["spec"]["podCIDR"]
    network_address = subnet.partition("/")[0]
    stored = json.loads(annotations(node).get("backend-data") or "null") or {}
    if not DEVICE.exists():
        mac = stored.get("VtepMAC") or "0e:" + ":".join(f"{it:02x}" for it in secrets.token_bytes(5))
        run(
            f"ip link add flannel.1 address {mac} mtu {mtu}"
            f" type vxlan id 1 local {address} dev eth0 dstport 8472 nolearning"
        )
    run(f"ip addr replace {network_address}/32 dev flannel.1", "ip link set flannel.1 up")
    data = json.dumps({"VNI": 1, "VtepMAC": (DEVICE / "address").read_text().strip()}, separators=(",", ":"))
    texts = {"backend-data": data, "backend-type": "vxlan", "kube-subnet-manager": "true", "public-ip": address}
    ask(f"nodes/{name}/status", {"metadata": {"annotations": {PREFIX + key: text for key, text in texts.items()}}})
    env = Path("/run/flannel/subnet.env")
    env.parent.mkdir(exist_ok=True)
    gateway = network_address.removesuffix("0") + "1"
    lines = ["FLANNEL_NETWORK=10.244.0.0/16", f"FLANNEL_SUBNET={gateway}/24", f"FLANNEL_MTU={mtu}"]
    env.write_text("\n".join([*lines, "FLANNEL_IPMASQ=false"]) + "\n")


def follow() -> None:
    done: dict[str, tuple[str, str]] = {}
    while True:
        for node in ask("nodes")["items"]:
            texts = annotations(node)
            if node["metadata"]["name"] == name or texts.get("backend-type") != "vxlan":
                done.pop(node["metadata"]["name"], None)
                continue
            mac, peer = json.loads(texts["backend-data"])["VtepMAC"], texts["public-ip"]
            if done.get(node["metadata"]["name"]) != (mac, peer):
                subnet = node["spec"]["podCIDR"]
                tunnel = subnet.partition("/")[0]
                run(
                    f"ip neigh replace {tunnel} lladdr {mac} dev flannel.1 nud permanent",
                    f"bridge fdb replace {mac} dev flannel.1 dst {peer} self permanent",
                    f"ip route replace {subnet} via {tunnel} dev flannel.1 onlink",
                )
                done[node["metadata"]["name"]] = mac, peer
        time.sleep(0.1)


os.environ.setdefault("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
set_up()
print("ready", flush=True)
follow()

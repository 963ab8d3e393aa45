"""Hosts and pods that have IPv6 and no IPv4 at all.

    pod h1/p1 -- cni0 [h1] eth0 -- underlay (fd00:77::/64) -- eth0 [h2] cni0 -- pod h2/p1
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from test_dual_stack import IPV6_NETWORK
from test_host_probes import ALLOWED, OFTEN, let_ping
from traffic import (
    CLEANUP,
    REAL_TIME,
    assert_no_traceback,
    ipv6_gateway,
    is_answered,
    read_status,
    wait_for_peers,
)

from udptun.lab.host import UNDERLAY_IPV6, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import KUBE_PORT, Lab

pytestmark = pytest.mark.netns

WAYS: Mapping[str, tuple[Mapping[str, object], str]] = {
    "kube": ({"Type": "vxlan"}, "kube"),
    "local": ({"Type": "host-gw"}, "local"),
    "tunnel": ({"Type": "udp"}, "local"),
    "vtep": ({"Type": "vxlan", "Userspace": True}, "local"),
}


def ipv6_lab(name: str, backend: Mapping[str, object], store: str) -> Lab:
    conf = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": IPV6_NETWORK, "Backend": dict(backend)}
    lab = Lab(f"{name}{os.getpid()}", net_conf=conf, store=store, ipv6=True, ipv4=False)
    assert lab.daemon_command[:3] == [sys.executable, "-m", "udptun"]
    lab.daemon_command[1:3] = ["-c", OFTEN]
    lab.daemon_command[:0] = REAL_TIME
    lab.daemon_command.append("--ip-masq")
    return lab


@pytest.fixture(scope="module", params=WAYS)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with ipv6_lab(f"s{request.param[:1]}", *WAYS[request.param]) as lab:
        lab.start()
        wait_for_peers(lab)
        yield lab
        assert_no_traceback(lab.hosts)


def subnet_of(host: Host) -> str:
    return str(ipv6_gateway(host).network)


def only_peer(host: Host) -> dict[str, Any]:
    (found,) = read_status(host)["peers"]
    return dict(found)


def test_pods_reach_each_other_and_what_is_outside(lab: Lab, slack: int) -> None:
    one, other = lab.host(1).pod(1), lab.host(2).pod(1)
    wait_until("an answer", lambda: is_answered(one, other.address), 5 * slack)
    mtu = lab.host(1).mtu
    assert mtu == {"vxlan": 1430, "udp": 1452, "host-gw": 1500}[read_status(lab.host(1))["backend"]["type"]]
    assert is_answered(other, one.address, mtu - 48)
    assert is_answered(one, UNDERLAY_IPV6[1]), "masqueraded"


def test_all_that_is_said_is_of_ipv6(lab: Lab) -> None:
    host, other = lab.host(1), lab.host(2)
    assert list(host.subnet_env()) == [
        *("FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET", "FLANNEL_MTU", "FLANNEL_IPMASQ")
    ]
    status = read_status(host)
    assert status["problems"] == []
    assert status["network"] == IPV6_NETWORK
    assert status["lease"]["subnet"] == subnet_of(host)
    assert status["lease"]["public_ip"] == status["underlay"]["address"] == str(host.underlay_ipv6)
    peer = {"subnet": subnet_of(other), "public_ip": str(other.underlay_ipv6)}
    for peers in (status["peers"], status["ipv6"]["peers"]):
        assert [{key: it[key] for key in peer} for it in peers] == [peer]
    text = host.run([sys.executable, "-m", "udptun", "status"]).stdout
    assert f"lease      {subnet_of(host)} of {IPV6_NETWORK}, " in text
    assert host.run(["ip", "-4", "route", "show", "proto", "158"]).stdout == ""
    assert host.run(["ip", "link", "show", "flannel.1"], check=False).returncode != 0


def test_peers_are_found_alive_and_measured(lab: Lab, slack: int) -> None:
    """Through the tunnel it is done as ever."""
    host = lab.host(1)
    let_ping(host, ALLOWED)
    wait_until("the measure", lambda: only_peer(host)["path_mtu"] is not None, 5 * slack)
    assert (only_peer(host)["liveness"], only_peer(host)["path_mtu"]) == ("alive", host.mtu)


@pytest.mark.parametrize("lab", ["kube", "local"], indirect=True)
def test_peers_are_probed_by_icmpv6(lab: Lab, slack: int) -> None:
    """Nothing was known of them; with vxlan the tunnel address of a peer is asked, with host-gw its PublicIPv6."""
    host = lab.host(1)
    let_ping(host, ALLOWED)
    wait_until("the measure", lambda: only_peer(host)["path_mtu"] is not None, 5 * slack)
    assert read_status(host)["backend"]["probes"] == "on"
    drop = "add table inet t; add chain inet t c { type filter hook input priority 0; }; add rule inet t c icmpv6 type"
    lab.host(2).run(["nft", f"{drop} echo-request drop"])
    wait_until("the verdict", lambda: only_peer(host)["liveness"] == "dead", 10 * slack)
    (line,) = read_status(host)["problems"]
    where = f"{subnet_of(lab.host(2))} at {lab.host(2).underlay_ipv6}"
    assert line.startswith(f"the host of {where} has answered and does not any more")
    lab.host(2).run(["nft", "delete table inet t"])
    wait_until("alive", lambda: only_peer(host)["liveness"] == "alive", 10 * slack)


@pytest.mark.parametrize("lab", ["kube"], indirect=True)
def test_the_node_has_annotations_of_ipv6_alone_and_is_available(lab: Lab) -> None:
    url = f"http://[{UNDERLAY_IPV6[1]}]:{KUBE_PORT}/api/v1/nodes/h1"
    node = json.loads(lab.host(1).run(["curl", "-s", url]).stdout)
    prefix = "flannel.alpha.coreos.com/"
    said = {key.removeprefix(prefix): text for key, text in node["metadata"]["annotations"].items()}
    assert list(said) == ["backend-data", "backend-type", "backend-v6-data", "kube-subnet-manager", "public-ipv6"]
    assert said["public-ipv6"] == str(lab.host(1).underlay_ipv6)
    assert json.loads(said["backend-v6-data"]).keys() == {"VNI", "VtepMAC"}
    (condition,) = [it for it in node["status"]["conditions"] if it["type"] == "NetworkUnavailable"]
    assert (condition["status"], condition["message"]) == ("False", "Flannel is running on this node")


def test_the_next_daemon_goes_on_and_cleanup_removes_it_all(lab: Lab, slack: int) -> None:
    host = lab.host(1)
    before = subnet_of(host)
    assert host.stop_daemon() == 0
    host.start_daemon()
    host.wait_ready()
    assert subnet_of(host) == before
    wait_until("an answer", lambda: is_answered(host.pod(1), lab.host(2).pod(1).address), 5 * slack)
    assert host.stop_daemon() == 0
    host.run(CLEANUP)
    assert host.run(["ip", "-6", "route", "show", "proto", "158"]).stdout == ""
    assert host.run(["ip", "link", "show", "flannel-v6.1"], check=False).returncode != 0
    assert "FLANNEL" not in host.run(["ip6tables", "-t", "nat", "-S"]).stdout

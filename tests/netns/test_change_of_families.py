"""A network config that gets and loses an address family, from one start of the daemon to the next.

    pod h1/p1 -- cni0 [h1] eth0 -- underlay (192.168.77.0/24, fd00:77::/64)
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping

import pytest
from traffic import CLEANUP, assert_no_traceback, datapath_pids, problems, read_status

from udptun.core.family import Family
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import NET_CONF, Lab

pytestmark = pytest.mark.netns

NETWORKS = {Family.IPV4: "10.244.", Family.IPV6: "fd00:244:"}
BOTH, IPV4, IPV6 = tuple(Family), (Family.IPV4,), (Family.IPV6,)
BACKENDS: Mapping[str, Mapping[str, object]] = {
    "udp": {"Type": "udp"},
    "vxlan": {"Type": "vxlan"},
    "vtep": {"Type": "vxlan", "Userspace": True},
    "host-gw": {"Type": "host-gw"},
}
DEVICES: Mapping[str, Mapping[Family, str]] = {
    "udp": dict.fromkeys(Family, "flannel0"),
    "vxlan": {Family.IPV4: "flannel.1", Family.IPV6: "flannel-v6.1"},
    "vtep": {Family.IPV4: "flannel.1", Family.IPV6: "flannel-v6.1"},
    "host-gw": {},
}


def conf_of(families: Collection[Family], backend: str, *, nftables: bool) -> dict[str, object]:
    return {
        "EnableIPv4": Family.IPV4 in families,
        "EnableIPv6": Family.IPV6 in families,
        "EnableNFTables": nftables,
        "Network": "10.244.0.0/16",
        "IPv6Network": "fd00:244::/48",
        "Backend": BACKENDS[backend],
    }


def devices(host: Host) -> set[str]:
    links = json.loads(host.run(["ip", "-j", "link", "show"]).stdout)
    return {link["ifname"] for link in links if link["ifname"].startswith("flannel")}


def traces(host: Host, family: Family) -> str:
    """All lines about the family's Network in routes, addresses of our devices and firewall rules."""
    program = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}[family]
    commands = (
        f"ip -{family.value} route show table main proto 158",
        f"ip -{family.value} -o address show | grep flannel",
        f"{program}-save",
        f"nft list ruleset {'ip' if family is Family.IPV4 else 'ip6'}",
    )
    lines = [line for it in commands for line in host.run(["sh", "-c", it], check=False).stdout.splitlines()]
    return "\n".join(line for line in lines if NETWORKS[family] in line)


@pytest.mark.parametrize("nftables", [False, True], ids=["iptables", "nft"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_family_that_is_enabled_no_longer_leaves_nothing(backend: str, nftables: bool, slack: int) -> None:
    """Its rules, routes, addresses and device stayed, cleanup knew nothing of them, and the next start of Type udp with
    IPv6 alone found the port taken by the datapath of the run before.
    """
    conf = conf_of(BOTH, backend, nftables=nftables)
    with Lab(f"cf{os.getpid()}", net_conf=conf, n_hosts=1, n_pods=0, ipv6=True) as lab:
        lab.daemon_command += ["--ip-masq", "--ip-blackhole-route"]
        lab.start()
        host = lab.host(1)
        for families in (BOTH, IPV6, BOTH, IPV4, IPV6, IPV4):
            host.path(NET_CONF).write_text(json.dumps(conf_of(families, backend, nftables=nftables)))
            assert host.stop_daemon() == 0
            host.start_daemon()
            host.wait_ready(10 * slack)
            for family in Family:
                assert bool(traces(host, family)) == (family in families), traces(host, family)
            assert devices(host) == {it for family, it in DEVICES[backend].items() if family in families}
            wait_until("no problem", lambda: problems(host) == [], 5 * slack)
            n_datapaths = {"udp": 1, "vtep": len(families)}.get(backend, 0)
            wait_until("all datapath processes", lambda n=2 * n_datapaths: len(datapath_pids(host)) == n, 5 * slack)
            status = read_status(host)
            assert (status["ipv6"] is not None) == (Family.IPV6 in families)
        host.stop_daemon()
        host.run(CLEANUP)
        assert [traces(host, family) for family in Family] == ["", ""]
        assert devices(host) == set()
        assert_no_traceback(lab.hosts)

"""Both address families over the backends that the kernel carries.

    pod h1/p1 -- cni0 [h1] eth0 -- underlay (192.168.77.0/24, fd00:77::/64) -- eth0 [h2] cni0 -- pod h2/p1
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
from traffic import (
    CLEANUP,
    REAL_TIME,
    assert_no_traceback,
    ipv6_gateway,
    is_answered,
    problems,
    read_status,
    seconds_until,
    wait_for_peers,
)

from udptun.core.family import Family
from udptun.lab.host import UNDERLAY, UNDERLAY_IPV6, Host, Pod
from udptun.lab.machine import wait_until
from udptun.lab.topology import KUBE_PORT, NET_CONF, Lab

pytestmark = pytest.mark.netns

NETWORK, IPV6_NETWORK = "10.244.0.0/16", "fd00:244::/48"
BACKENDS: Mapping[str, Mapping[str, object]] = {"vxlan": {"Type": "vxlan"}, "host-gw": {"Type": "host-gw"}}
DEVICE = "flannel-v6.1"


def dual_stack_lab(name: str, backend: Mapping[str, object], store: str = "local") -> Lab:
    """With `kube` the podCIDR of IPv6 comes first."""
    conf = {"Network": NETWORK, "EnableIPv6": True, "IPv6Network": IPV6_NETWORK, "Backend": dict(backend)}
    cidrs = [Family.IPV6, Family.IPV4]
    lab = Lab(f"{name}{os.getpid()}", net_conf=conf, store=store, ipv6=True, pod_cidrs=cidrs)
    lab.daemon_command[:0] = REAL_TIME
    return lab


@pytest.fixture(scope="module", params=BACKENDS)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Two hosts for each backend, shared by the tests of the module; those of vxlan are nodes of Kubernetes."""
    store = "kube" if request.param == "vxlan" else "local"
    with dual_stack_lab(f"d{request.param[:2]}", BACKENDS[request.param], store) as lab:
        lab.daemon_command.append("--ip-masq")
        lab.start()
        wait_for_peers(lab)
        yield lab
        assert_no_traceback(lab.hosts)


def wait_for_both(lab: Lab) -> None:
    one, other = lab.host(1).pod(1), lab.host(2).pod(1)
    for address in (other.address, other.ipv6_address):
        wait_until(f"{address} to answer", lambda address=address: is_answered(one, address), 10)


@contextmanager
def vxlan_lab(name: str) -> Iterator[Lab]:
    """Two hosts of one test's own, whose pods reach each other by both families."""
    with dual_stack_lab(name, {"Type": "vxlan"}) as lab:
        lab.start()
        wait_for_peers(lab)
        wait_for_both(lab)
        yield lab


def is_refused(source: Pod, destination: Pod) -> bool:
    """Whether the host of `source` refuses IPv6 packets to `destination`."""
    command = ["ping", "-c", "1", "-W", "1", str(destination.ipv6_address)]
    return "Destination unreachable" in source.run(command, check=False).stdout


def is_vxlan(lab: Lab) -> bool:
    return read_status(lab.host(1))["backend"]["type"] == "vxlan"


def test_pods_reach_each_other_by_both_families_with_packets_as_long_as_the_pods_may_send(lab: Lab) -> None:
    wait_for_both(lab)
    one, other = lab.host(1).pod(1), lab.host(2).pod(1)
    mtu = lab.host(1).mtu
    assert mtu == (1430 if is_vxlan(lab) else 1500)
    assert is_answered(one, other.address, mtu - 28)
    assert is_answered(one, other.ipv6_address, mtu - 48)
    assert is_answered(other, one.ipv6_address, mtu - 48)


def test_subnet_env_and_status_name_both_families(lab: Lab) -> None:
    host, other = lab.host(1), lab.host(2)
    env, status = host.subnet_env(), read_status(host)
    assert list(env) == [
        *("FLANNEL_NETWORK", "FLANNEL_SUBNET", "FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET"),
        *("FLANNEL_MTU", "FLANNEL_IPMASQ"),
    ]
    assert env["FLANNEL_IPV6_NETWORK"] == IPV6_NETWORK
    assert status["ipv6"] == {
        "network": IPV6_NETWORK,
        "subnet": str(ipv6_gateway(host).network),
        "public_ip": str(host.underlay_ipv6),
        "address": str(host.underlay_ipv6),
        "device": DEVICE if is_vxlan(lab) else None,
        "mtu": 1430 if is_vxlan(lab) else 1500,
        "datapath": None,
        "counters": {},
        "peers": [
            {"subnet": str(ipv6_gateway(other).network), "public_ip": str(other.underlay_ipv6)}
            | {"liveness": "unknown", "rtt_ms": None, "rtt_age_s": None, "path_mtu": None}
            | {"probes_sent": 0, "probes_lost": 0}
        ],
    }
    assert status["problems"] == []
    text = host.run([sys.executable, "-m", "udptun", "status"]).stdout
    assert f"IPv6       {ipv6_gateway(host).network} of {IPV6_NETWORK}, public {host.underlay_ipv6}, " in text


@pytest.mark.parametrize("lab", ["vxlan"], indirect=True)
def test_a_reload_whose_mtu_is_too_small_for_ipv6_switches_it_off_until_another_one(lab: Lab, slack: int) -> None:
    """The reload ended the daemon with an AssertionError, or left what IPv6 needed as it was."""
    host, other = lab.hosts
    wait_for_both(lab)
    text = host.path(NET_CONF).read_text()
    conf = json.loads(text)
    conf["Backend"]["MTU"] = 1349
    lack = (
        "pods have no IPv6 to other hosts: an underlay MTU of 1349 leaves 1279 bytes for the pods' packets; IPv6 needs "
        "1280, so the underlay needs 1350"
    )
    reload(host, json.dumps(conf))
    wait_until("the problem", lambda: problems(host) == [lack], 5 * slack)
    wait_until("the MTU", lambda: host.mtu == 1299, 5 * slack)
    wait_until("refusals", lambda: is_refused(host.pod(1), other.pod(1)), 5 * slack)
    assert is_answered(host.pod(1), other.pod(1).address)
    reload(host, text)
    wait_until("IPv6", lambda: problems(host) == [] and host.mtu == 1430, 5 * slack)
    wait_for_both(lab)


def reload(host: Host, text: str) -> None:
    host.path(NET_CONF).write_text(text)
    assert host.daemon is not None
    host.daemon.send_signal(signal.SIGHUP)


def test_the_kernel_has_what_flannel_would_have_set_up(lab: Lab) -> None:
    host, other = lab.host(1), lab.host(2)
    subnet = ipv6_gateway(other).network
    first = subnet.network_address
    route = host.run(["ip", "-6", "route", "show", str(subnet)]).stdout
    if not is_vxlan(lab):
        assert route.startswith(f"{subnet} via {other.underlay_ipv6} dev eth0 proto 158 ")
        return
    assert route.startswith(f"{subnet} via {first} dev {DEVICE} proto 158 metric 1024 onlink ")
    link = host.run(["ip", "-d", "link", "show", DEVICE]).stdout
    assert f" vxlan id 1 local {host.underlay_ipv6} dev eth0 " in link
    assert " dstport 8472 nolearning " in link
    assert " mtu 1430 " in link
    mac = other.run(["cat", f"/sys/class/net/{DEVICE}/address"]).stdout.strip()
    neighbours = host.run(["ip", "-6", "neigh", "show", "dev", DEVICE, "nud", "permanent"]).stdout
    assert neighbours.split() == [str(first), "lladdr", mac, "PERMANENT"]
    fdb = host.run(["bridge", "fdb", "show", "dev", DEVICE]).stdout
    assert fdb.split() == [mac, "dst", str(other.underlay_ipv6), "self", "permanent"]


def test_what_leaves_the_overlay_by_ipv6_is_masqueraded(lab: Lab) -> None:
    """The host outside has no route to pods, so it answers only what has the host's own address."""
    assert is_answered(lab.host(1).pod(1), UNDERLAY_IPV6[1])
    rules = lab.host(1).run(["ip6tables", "-t", "nat", "-S", "FLANNEL-POSTRTG"]).stdout.splitlines()
    gateway = ipv6_gateway(lab.host(1))
    comment = '-m comment --comment "flanneld masq"'
    assert rules == [
        "-N FLANNEL-POSTRTG",
        f"-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {comment} -j RETURN",
        f"-A FLANNEL-POSTRTG -s {gateway.network} -d {IPV6_NETWORK} {comment} -j RETURN",
        f"-A FLANNEL-POSTRTG -s {IPV6_NETWORK} -d {gateway.network} {comment} -j RETURN",
        f"-A FLANNEL-POSTRTG ! -s {IPV6_NETWORK} -d {gateway.network} {comment} -j RETURN",
        f"-A FLANNEL-POSTRTG -s {IPV6_NETWORK} ! -d ff00::/8 {comment} -j MASQUERADE --random-fully",
        f"-A FLANNEL-POSTRTG ! -s {IPV6_NETWORK} -d {IPV6_NETWORK} {comment} -j MASQUERADE --random-fully",
    ]


DAMAGES = {
    "routes": "ip -6 route flush proto 158",
    "device": f"ip link del {DEVICE} 2>/dev/null; ip -6 route flush proto 158",
    "address and neighbours": f"ip -6 addr flush dev {DEVICE} 2>/dev/null; ip -6 neigh flush nud permanent; true",
    "rules": "ip6tables -t nat -F FLANNEL-POSTRTG",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_somebody_removes_comes_back_and_ipv4_does_not_notice(lab: Lab, damage: str, slack: int) -> None:
    wait_for_both(lab)
    host = lab.host(1)
    before = picture(host)
    host.run(["sh", "-c", damage])
    assert is_answered(host.pod(1), lab.host(2).pod(1).address)
    took_s = seconds_until(lambda: picture(host) == before, "the repair", 5 * slack)
    print(f"repaired after {took_s:.2f} s")
    assert took_s < slack
    wait_for_both(lab)


def picture(host: Host) -> list[str]:
    """All of IPv6 that a damage of the table touches, without what counts and times."""
    commands = (
        "ip -6 route show proto 158",
        f"ip -6 addr show dev {DEVICE} scope global | grep inet6",
        f"ip -6 neigh show dev {DEVICE} nud permanent",
        f"bridge fdb show dev {DEVICE}",
        "ip6tables -t nat -S FLANNEL-POSTRTG",
    )
    return [host.run(["sh", "-c", f"{command} 2>/dev/null; true"]).stdout for command in commands]


HINDRANCES = {
    "sysctl -qw net.ipv6.conf.all.forwarding=0": (
        "sysctl -qw net.ipv6.conf.all.forwarding=1",
        "net.ipv6.conf.all.forwarding is 0, so no IPv6 packet passes between pods here and other hosts; run `sysctl -w "
        "net.ipv6.conf.all.forwarding=1`, and have /etc/sysctl.d keep it",
    ),
    "ip6tables -I FORWARD -i cni0 -j DROP": (
        "ip6tables -D FORWARD -i cni0 -j DROP",
        "rule 1 of FORWARD (ip6tables-nft, table filter) drops IPv6 packets from pods here to other hosts; delete it, "
        f"or accept the overlay before it: `ip6tables-nft -I FORWARD -s {IPV6_NETWORK} -j ACCEPT`, and the same "
        "with -d",
    ),
}


@pytest.mark.parametrize("hindrance", HINDRANCES)
def test_what_keeps_ipv6_packets_from_pods_is_named_until_it_is_gone(lab: Lab, hindrance: str, slack: int) -> None:
    """`udptun status` said that all was well.  The line names what mends it."""
    host = lab.host(1)
    healing, line = HINDRANCES[hindrance]
    host.run(hindrance.split())
    wait_until("the line", lambda: problems(host) == [line], 5 * slack)
    host.run(healing.split())
    wait_until("none", lambda: problems(host) == [], 5 * slack)


def test_a_host_that_loses_its_ipv4_address_goes_on_with_ipv6_and_takes_ipv4_up_again(slack: int) -> None:
    """It ended, and pods had no network at all after the next restart."""
    with vxlan_lab("db") as lab:
        one, other = lab.host(1), lab.host(2)
        address = f"{one.underlay_address}/{UNDERLAY.prefixlen}"
        one.machine.at().ip(f"addr del {address} dev eth0")
        lack = "pods have no IPv4 to other hosts: eth0 has no IPv4 address that other hosts could send to; give it one"
        wait_until("the problem", lambda: lack in (problems(one) or ()), 5 * slack)
        wait_until("IPv6", lambda: is_answered(one.pod(1), other.pod(1).ipv6_address), 5 * slack)
        refused = ["ping", "-c", "1", "-W", "1", str(other.pod(1).address)]
        wait_until("refusals", lambda: "nreachable" in one.pod(1).run(refused, check=False).stdout, 5 * slack)
        assert one.mtu == 1430
        one.machine.at().ip(f"addr add {address} brd + dev eth0", f"route replace default via {UNDERLAY[1]}")
        wait_until("IPv4", lambda: problems(one) == [], 5 * slack)
        wait_for_both(lab)


def test_a_host_that_loses_its_ipv6_address_goes_on_with_ipv4_and_takes_ipv6_up_again(slack: int) -> None:
    """The guard routes refuse IPv6 packets meanwhile, so that none leaves in clear text by the default route."""
    with vxlan_lab("da") as lab:
        one, other = lab.host(1), lab.host(2)
        address = f"{one.underlay_ipv6}/{UNDERLAY_IPV6.prefixlen}"
        one.machine.at().ip(f"addr del {address} dev eth0")
        lack = "pods have no IPv6 to other hosts: eth0 has no IPv6 address that other hosts could send to; give it one"
        wait_until("the problem", lambda: lack in (problems(one) or ()), 5 * slack)
        assert is_answered(one.pod(1), other.pod(1).address)
        # Until the daemon has begun again the tunnel swallows them.
        wait_until("refusals", lambda: is_refused(one.pod(1), other.pod(1)), 5 * slack)
        one.machine.at().ip(f"addr add {address} dev eth0 nodad", f"route replace default via {UNDERLAY_IPV6[1]}")
        wait_until("IPv6", lambda: problems(one) == [], 5 * slack)
        wait_for_both(lab)
        assert one.stop_daemon() == 0
        removed = one.run(CLEANUP).stdout
        assert f"deleted link {DEVICE}\n" in removed
        assert f"deleted route unreachable {IPV6_NETWORK.replace('::/48', ':0:1::/64')}" in removed
        assert one.run(["ip", "-6", "route", "show", "proto", "158"]).stdout == ""


def test_direct_routes_and_nftables_have_ipv6_as_they_have_ipv4(slack: int) -> None:
    """A plain route to a peer on the link, the tunnel to one behind a router, and a table that comes back."""
    backend = {"Type": "vxlan", "DirectRouting": True}
    conf = {"Network": NETWORK, "EnableIPv6": True, "IPv6Network": IPV6_NETWORK, "EnableNFTables": True}
    with Lab(f"dn{os.getpid()}", net_conf=conf | {"Backend": backend}, ipv6=True) as lab:
        lab.daemon_command.append("--ip-masq")
        lab.start()
        wait_for_peers(lab)
        one, other = lab.hosts
        subnet = ipv6_gateway(other).network

        def leads(way: str) -> bool:
            return one.run(["ip", "-6", "route", "show", str(subnet)]).stdout.startswith(f"{subnet} via {way} ")

        direct, tunnelled = f"{other.underlay_ipv6} dev eth0", f"{subnet.network_address} dev {DEVICE}"
        wait_until("a direct route", lambda: leads(direct), 5 * slack)
        wait_for_both(lab)
        router = f"route {{}} {other.underlay_ipv6}/128 via {UNDERLAY_IPV6[1]}"
        one.machine.at().ip(router.format("add"))
        wait_until("the tunnel", lambda: leads(tunnelled), 5 * slack)
        wait_for_both(lab)
        one.machine.at().ip(router.format("del"))
        wait_until("a direct route again", lambda: leads(direct), 5 * slack)
        table = ["nft", "list", "table", "ip6", "flannel-ipv6"]
        before = one.run(table).stdout
        assert f"ip6 saddr {IPV6_NETWORK} ip6 daddr != ff00::/8 masquerade fully-random" in before
        for damage in ("delete table", "flush table"):
            one.run(["nft", *damage.split(), "ip6", "flannel-ipv6"])
            wait_until("the table", lambda: one.run(table, check=False).stdout == before, 5 * slack)
        assert is_answered(one.pod(1), UNDERLAY_IPV6[1])
        assert problems(one) == []


@pytest.mark.parametrize("given", Family, ids=str)
def test_a_node_with_one_podcidr_carries_that_family_and_says_what_the_other_lacks(given: Family, slack: int) -> None:
    """The store gives the subnets: a daemon that insisted on two would end, and pods had no network at all.

    Once the node is there with both podCIDRs, both families are carried.
    """
    conf = {"Network": NETWORK, "EnableIPv6": True, "IPv6Network": IPV6_NETWORK, "Backend": {"Type": "vxlan"}}
    (lacking,) = set(Family) - {given}
    is_ipv4, version = given is Family.IPV4, f"-{lacking.value}"
    with Lab(f"dk{os.getpid()}", net_conf=conf, store="kube", ipv6=True, pod_cidrs=[given]) as lab:
        lab.daemon_command[:0] = REAL_TIME
        lab.daemon_command.append("--ip-masq")
        lab.start()
        one, other = lab.host(1), lab.host(2)
        wait_until(str(given), lambda: is_answered(one.pod(1), other.pod(1).address), 10)
        status = read_status(one)
        lack = (
            f"pods have no {lacking} to other hosts: our lease has no {lacking} subnet; give this host one, as a "
            "second podCIDR where Kubernetes does"
        )
        assert status["problems"] == [lack]
        if is_ipv4:
            assert (status["ipv6"]["subnet"], status["ipv6"]["device"], status["ipv6"]["mtu"]) == (None, None, None)
        assert f"FLANNEL_{'IPV6_' * is_ipv4}SUBNET" not in one.subnet_env()
        assert one.mtu == (1450 if is_ipv4 else 1430)
        # The device was made before the lease was known.
        device = DEVICE if is_ipv4 else "flannel.1"
        assert one.run(["ip", "link", "show", device], check=False).returncode != 0
        assert one.run(["ip", version, "route", "show", "proto", "158"]).stdout == ""
        iptables = "ip6tables" if is_ipv4 else "iptables"
        assert "FLANNEL" not in one.run([iptables, "-t", "nat", "-S"]).stdout
        said = f"Flannel is running on this node; {lack}"
        wait_until("the condition", lambda: network_message(one) == said, 5 * slack)

        give_both_podcidrs(one)
        subnets = {"FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"}
        wait_until("both families", lambda: problems(one) == [] and subnets <= one.subnet_env().keys(), 5 * slack)
        assert list(one.subnet_env())[1:4:2] == ["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"]
        wait_until("the condition", lambda: network_message(one) == "Flannel is running on this node", 5 * slack)


@pytest.fixture(scope="module")
def ipv6_podcidrs() -> Iterator[Lab]:
    """Type udp in dual stack, on nodes that have an IPv6 podCIDR alone."""
    conf = {"Network": NETWORK, "EnableIPv6": True, "IPv6Network": IPV6_NETWORK, "Backend": {"Type": "udp"}}
    with Lab(f"do{os.getpid()}", net_conf=conf, store="kube", ipv6=True, pod_cidrs=[Family.IPV6]) as lab:
        lab.daemon_command[:0] = REAL_TIME
        lab.start()
        wait_for_peers(lab)
        yield lab


def test_type_udp_with_an_ipv6_podcidr_alone_starts_and_starts_again(ipv6_podcidrs: Lab) -> None:
    """Each start deleted flannel0, which has the mark of IPv4's Network, because the lease has no IPv4 subnet.  It then
    ended with EBADFD.
    """
    host, other = ipv6_podcidrs.hosts
    wait_until("IPv6", lambda: is_answered(host.pod(1), other.pod(1).address), 10)
    assert host.stop_daemon() == 0
    # It may be there of a time with both podCIDRs.
    host.run(["ip", "addr", "add", "10.244.1.0/32", "dev", "flannel0"])
    host.start_daemon()
    host.wait_ready(20)
    assert is_answered(host.pod(1), other.pod(1).address)
    (problem,) = read_status(host)["problems"]
    assert problem.startswith("pods have no IPv4 to other hosts: our lease has no IPv4 subnet; ")
    assert host.run(["ip", "-4", "addr", "show", "dev", "flannel0"]).stdout == ""
    assert host.run(["ip", "-4", "route", "show", "proto", "158"]).stdout == ""


def test_status_shows_a_peer_with_both_subnets_by_the_family_that_is_carried(ipv6_podcidrs: Lab, slack: int) -> None:
    """It had the IPv4 subnet, which nothing was known of: no counters, and liveness unknown."""
    host, other = ipv6_podcidrs.hosts
    give_both_podcidrs(other)
    wait_until("the other lease", lambda: "FLANNEL_SUBNET" in other.subnet_env(), 5 * slack)
    # From here on it knows that lease alone.
    assert host.stop_daemon() == 0
    host.start_daemon()
    host.wait_ready(20)
    shown = {"subnet": "fd00:244:0:2::/64", "public_ip": str(other.underlay_address), "liveness": "alive"}

    def is_shown() -> bool:
        is_answered(host.pod(1), other.pod(1).address)
        status = read_status(host)
        (peer,) = status["peers"]
        assert [it["subnet"] for it in status["ipv6"]["peers"]] == [peer["subnet"]] == [shown["subnet"]]
        return shown.items() <= peer.items() and peer["encap_packets"] > 0

    wait_until("what is known of the peer", is_shown, 10 * slack)


def give_both_podcidrs(host: Host) -> None:
    cidrs = [f"10.244.{host.index}.0/24", f"fd00:244:0:{host.index}::/64"]
    node = {"kind": "Node", "apiVersion": "v1", "metadata": {"name": host.name}, "spec": {"podCIDRs": cidrs}}
    host.run(["curl", "-sf", "-X", "DELETE", f"{NODES}/{host.name}"])
    host.run(["curl", "-sf", "-H", "Content-Type: application/json", "-d", json.dumps(node), NODES])


NODES = f"http://{UNDERLAY[1]}:{KUBE_PORT}/api/v1/nodes"


def network_message(host: Host) -> str:
    node = json.loads(host.run(["curl", "-s", f"{NODES}/{host.name}"]).stdout)
    conditions = node.get("status", {}).get("conditions", ())
    return next((it["message"] for it in conditions if it["type"] == "NetworkUnavailable"), "")

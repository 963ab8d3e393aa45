"""The CNI plugin with the real bridge and host-local of containernetworking-plugins, in a host of a lab."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Interface
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.cni_plugin import (
    DUAL_ENV,
    IPV4_ENV,
    IPV6_ENV,
    MULTIPLE_ENV,
    NAME,
    Plugin,
    finish,
    installed,
)
from tests.namespace import seconds_until
from udptun.lab.host import Host
from udptun.lab.podman import plugin_directory

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(plugin_directory() is None, reason="needs bridge and host-local (containernetworking-plugins)"),
]

UDPTUN = (sys.executable, "-m", "udptun")
RESERVED = f"/var/lib/cni/networks/{NAME}"


@pytest.fixture
def plugin(host: Host, tmp_path: Path) -> Plugin:
    """Run in the host, whose /var/lib/cni is its own."""
    made = Plugin(tmp_path, installed(tmp_path / "bin"), (str(plugin_directory()),), host.machine.popen)
    made.subnet_file.write_text(IPV4_ENV)
    host.run(["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=0", "net.ipv6.conf.default.disable_ipv6=0"])
    return made


@pytest.fixture
def target(host: Host) -> Iterator[str]:
    """The network namespace of a container."""
    yield add_netns(host, "target")
    host.run(["ip", "netns", "del", "target"], check=False)


def add_netns(host: Host, name: str) -> str:
    host.run(["ip", "netns", "add", name])
    return f"/run/netns/{name}"


def reserved(host: Host) -> list[str]:
    directory = host.path(RESERVED)
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted(name for name in names if name != "lock" and not name.startswith("last_reserved"))


def links(host: Host, *words: str) -> list[str]:
    """Of the host; none where `master` names a bridge that is not there."""
    listed = host.run(["ip", "-j", "link", "show", *words], check=False).stdout
    return [link["ifname"] for link in json.loads(listed or "[]")]


STORED = (
    '{"ipMasq":false,"ipam":{"ranges":[%s],"routes":[%s],"type":"host-local"},'
    '"isGateway":true,"mtu":1472,"name":"cni-flannel","type":"bridge"}'
)


@pytest.mark.parametrize(
    ("container_id", "text", "stored", "n_addresses"),
    [
        (
            "some-container-id-ipv4",
            IPV4_ENV,
            STORED % ('[{"subnet":"10.1.17.0/24"}]', '{"dst":"10.1.0.0/16"}'),
            1,
        ),
        (
            "some-container-id-ipv4-multiple",
            MULTIPLE_ENV,
            STORED % ('[{"subnet":"10.1.17.0/24"}]', '{"dst":"10.1.0.0/16"},{"dst":"192.168.0.0/16"}'),
            1,
        ),
        ("some-container-id-ipv6", IPV6_ENV, STORED % ('[{"subnet":"fc00::/64"}]', '{"dst":"fc00::/48"}'), 1),
        (
            "some-container-id-dual-stack",
            DUAL_ENV,
            STORED
            % ('[{"subnet":"10.1.17.0/24"}],[{"subnet":"fc00::/64"}]', '{"dst":"10.1.0.0/16"},{"dst":"fc00::/48"}'),
            2,
        ),
    ],
    ids=["ipv4", "multiple", "ipv6", "dual"],
)
def test_life_of_a_container_as_in_flannels_tests(
    plugin: Plugin, host: Host, target: str, container_id: str, text: str, stored: str, n_addresses: int
) -> None:
    plugin.subnet_file.write_text(text)
    result = plugin.run("ADD", container_id, target).result()
    # Without a cniVersion, bridge answers as in 0.1.0: one object for each family.
    assert len({"ip4", "ip6"} & set(result)) == n_addresses
    assert plugin.stored(container_id) == stored
    assert len(reserved(host)) == n_addresses
    assert links(host, "master", "cni0") != []
    plugin.run("DEL", container_id, target).result()
    assert plugin.stored(container_id) is None
    assert reserved(host) == []
    assert links(host, "master", "cni0") == []
    plugin.run("DEL", container_id, target).result()


def test_check_finds_what_became_of_a_container(plugin: Plugin, host: Host, target: str) -> None:
    """Flannel's plugin answered that all is well."""
    conf: dict[str, Any] = {"cniVersion": "1.0.0"}
    conf["prevResult"] = plugin.run("ADD", "c1", target, conf=conf).result()
    plugin.run("CHECK", "c1", target, conf=conf).result()
    host.run(["ip", "-n", "target", "addr", "flush", "dev", "eth0"])
    assert "failed to delegate check: " in plugin.run("CHECK", "c1", target, conf=conf).error()["msg"]
    plugin.run("DEL", "c1", target, conf=conf).result()


def test_bridge_without_ports_and_with_an_address_of_another_subnet_is_repaired(
    plugin: Plugin, host: Host, target: str
) -> None:
    """It said `"cni0" already has an IP address different from` until somebody deleted the bridge by hand."""
    host.machine.at().ip("link add cni0 type bridge", "addr add 10.1.99.1/24 dev cni0", "link set cni0 up")
    answer = plugin.run("ADD", "c1", target)
    answer.result()
    assert "took 10.1.99.1/24 off cni0, which has no ports: this node's subnet is 10.1.17.0/24 now" in answer.stderr
    (bridge,) = json.loads(host.run(["ip", "-j", "-4", "addr", "show", "cni0"]).stdout)
    assert [it["local"] for it in bridge["addr_info"]] == ["10.1.17.1"]
    # And what is our own is left alone.
    add_netns(host, "second")
    assert "took" not in plugin.run("ADD", "c2", "/run/netns/second").stderr


def test_bridge_without_ports_loses_the_ipv6_address_of_another_subnet_and_its_route(
    plugin: Plugin, host: Host, target: str
) -> None:
    """bridge went on with both, and the kernel led packets for the subnet's new host into the bridge."""
    plugin.subnet_file.write_text(DUAL_ENV)
    host.machine.at().ip(
        *("link add cni0 type bridge", "addr add 10.1.17.1/24 dev cni0", "addr add fc00:0:0:9::1/64 dev cni0 nodad"),
        "link set cni0 up",
    )
    answer = plugin.run("ADD", "c1", target)
    answer.result()
    line = "took fc00:0:0:9::1/64 off cni0, which has no ports: this node's subnet is 10.1.17.0/24 and fc00::/64 now"
    assert line in answer.stderr
    listed = host.run(["ip", "-6", "-o", "addr", "show", "cni0", "scope", "global"]).stdout
    assert [line.split()[3] for line in listed.splitlines()] == ["fc00::1/64"]
    assert host.run(["ip", "-6", "route", "show", "fc00:0:0:9::/64"]).stdout == ""
    # With ports bridge goes on all the same, so we do.
    host.machine.at().ip("addr add fc00:0:0:9::1/64 dev cni0 nodad")
    assert "took" not in plugin.run("ADD", "c2", add_netns(host, "second")).stderr


def test_bridge_with_ports_and_with_an_address_of_another_subnet_is_named(
    plugin: Plugin, host: Host, target: str
) -> None:
    host.machine.at().ip(
        *("link add cni0 type bridge", "addr add 10.1.99.1/24 dev cni0", "link add veth77 type veth peer name veth78"),
        "link set veth77 master cni0",
    )
    error = plugin.run("ADD", "c1", target).error()
    assert error["code"] == 101
    assert (
        error["msg"] == '"cni0" already has an IP address different from this node\'s subnet 10.1.17.0/24: 10.1.99.1/24'
    )
    assert "(veth77)" in error["details"]
    assert "ip link delete cni0" in error["details"]
    assert (plugin.stored("c1"), reserved(host)) == (None, [])


def test_pod_learns_what_the_daemon_waits_for_and_comes_up_once_it_is_ready(
    plugin: Plugin, host: Host, target: str
) -> None:
    """All that it said was that subnet.env is not there."""
    conf = {"cniVersion": "1.0.0", "subnetFile": "/run/flannel/subnet.env"}
    status = host.path("/run/flannel/subnet.env.status")
    host.start_daemon(["--store=etcd", "--etcd-endpoints=http://127.0.0.1:1"])
    seconds_until(lambda: status.exists() and "error=" in status.read_text(), 30)
    error = plugin.run("ADD", "c1", target, conf=conf).error()
    assert error["code"] == 11
    assert error["msg"].startswith(
        "udptun on this node is not ready: waits for the network config in /coreos.com/network/config: "
    )
    assert "(since " in error["msg"]
    host.stop_daemon()
    assert "the daemon was stopped (since " in plugin.run("STATUS", conf={**conf, "cniVersion": "1.1.0"}).error()["msg"]
    host.start_daemon()
    host.wait_ready()
    assert json.loads(status.read_text())["state"] == "ready"
    result = plugin.run("ADD", "c1", target, conf=conf).result()
    assert IPv4Interface(result["ips"][0]["address"]).network == host.subnet
    host.stop_daemon()
    # Without the daemon, too.
    plugin.run("DEL", "c1", target, conf=conf).result()
    host.run([*UDPTUN, "cleanup"])
    assert not host.path("/run/flannel").exists()


def test_failed_add_leaves_no_address_and_no_link(plugin: Plugin, host: Host, target: str) -> None:
    """Flannel's plugin left the pod's link where bridge had failed half-way."""
    conf = {"delegate": {"mtu": 1}, "cniVersion": "0.4.0"}
    host.run(["ip", "-n", "target", "link", "add", "eth0", "type", "veth"])
    plugin.run("ADD", "c1", target, conf=conf).error()
    assert (plugin.stored("c1"), reserved(host), links(host, "master", "cni0")) == (None, [], [])


def test_addresses_of_containers_that_are_gone_are_given_out_again(plugin: Plugin, host: Host) -> None:
    """After a reboot, or with a DEL that was lost, there was soon `no IP addresses available in range set`."""
    plugin.subnet_file.write_text(IPV4_ENV.replace("10.1.17.1/24", "10.1.17.1/29"))
    for n in range(5):
        plugin.run("ADD", f"c{n}", add_netns(host, f"n{n}")).result()
    last = add_netns(host, "last")
    error = plugin.run("ADD", "new", last).error()
    assert "5 addresses are given out, none of them to a container that is known to be gone" in error["details"]
    for n in (1, 3):
        host.run(["ip", "netns", "del", f"n{n}"])
    answer = plugin.run("ADD", "new", last)
    answer.result()
    assert "deleted the attachment of container c1" in answer.stderr
    assert sorted(path.name for path in plugin.data_dir.iterdir()) == [".udptun", "c0", "c2", "c4", "new"]
    assert len(reserved(host)) == 4
    # And by hand.
    host.run(["ip", "netns", "del", "n4"])
    conf = plugin.directory / "net.conf"
    conf.write_text(json.dumps(plugin.conf))
    said = host.run([*UDPTUN, "cni", "gc", "--conf", str(conf)]).stdout
    assert said == (
        f"deleted the attachment of container c4\nnetwork {NAME}: 1 freed, 3 containers and 3 addresses stay\n"
    )
    assert len(reserved(host)) == 3


@pytest.mark.parametrize("n", [16, pytest.param(200, marks=[pytest.mark.full, pytest.mark.timeout(600)])])
def test_parallel_containers_come_and_go_and_leave_nothing(plugin: Plugin, host: Host, n: int) -> None:
    names = [f"c{i}" for i in range(n)]
    host.run(["sh", "-c", "".join(f"ip netns add {name};" for name in names)], timeout=120)
    conf: dict[str, Any] = {"cniVersion": "1.0.0", "delegate": {"hairpinMode": True, "isDefaultGateway": True}}
    started_s = time.monotonic()
    adding = [plugin.start("ADD", name, f"/run/netns/{name}", conf=conf) for name in names]
    results = [finish(process).result() for process in adding]
    added_s = time.monotonic() - started_s
    assert len({result["ips"][0]["address"] for result in results}) == n == len(reserved(host))
    assert len(links(host, "master", "cni0")) == n
    deleting = [plugin.start("DEL", name, f"/run/netns/{name}", conf=conf) for name in names]
    for process in deleting:
        finish(process).result()
    print(f"{n} ADD at once {added_s:.2f} s, with their DEL {time.monotonic() - started_s:.2f} s")
    assert reserved(host) == []
    assert links(host, "type", "veth") == ["eth0"]
    assert [path.name for path in plugin.data_dir.iterdir()] == [".udptun"]
    assert list((plugin.data_dir / ".udptun").iterdir()) == []


@pytest.mark.alone
def test_start_of_the_plugin_is_a_small_part_of_an_add(
    plugin: Plugin, host: Host, request: pytest.FixtureRequest, slack: int
) -> None:
    """VERSION in 60 ms, and no more than that added to an ADD."""
    bridge = replace(plugin, program=Path(f"{plugin_directory()}/bridge"))
    times: dict[str, list[float]] = {"VERSION": [], "ADD": [], "ADD of bridge": [], "nsenter": []}

    def measure(what: str, run: Callable[[], Any]) -> None:
        started_s = time.perf_counter()
        run()
        times[what].append(1000 * (time.perf_counter() - started_s))

    for i in range(21 if request.config.getoption("--full") else 5):
        ours, alone = add_netns(host, f"o{i}"), add_netns(host, f"b{i}")
        measure("nsenter", lambda: host.run(["true"]))
        measure("VERSION", lambda: plugin.run("VERSION").result())
        measure("ADD", lambda: plugin.run("ADD", f"o{i}", ours).result())  # noqa: B023 - it runs at once
        stored = json.loads(plugin.stored(f"o{i}") or "")
        measure("ADD of bridge", lambda: bridge.run("ADD", f"b{i}", alone, conf=stored).result())  # noqa: B023
    version, add, add_of_bridge, nsenter = (
        median(times[what]) for what in ("VERSION", "ADD", "ADD of bridge", "nsenter")
    )
    print(
        f"VERSION {version - nsenter:.1f} ms, ADD {add - nsenter:.1f} ms, bridge alone {add_of_bridge - nsenter:.1f} ms"
    )
    assert version - nsenter < 60 * slack
    assert add - add_of_bridge < 60 * slack

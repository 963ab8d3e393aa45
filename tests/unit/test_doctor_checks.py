"""udptun doctor: its table and page, what its checks make of facts, and how it prints them."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from udptun.backends.choice import parse_net_conf
from udptun.commands import doctor
from udptun.config.command_flags import DoctorRequest, flags_of_flanneld, parse_doctor_flags
from udptun.config.flags import parse_daemon_flags
from udptun.core.lease import Lease, LeaseAttrs, Subnets
from udptun.core.network_state import Address, Link, Route
from udptun.core.tunnel_path import TunnelPath
from udptun.doctor import daemon, files, firewall, kernel, others, paths, store
from udptun.doctor.checks import CHECKS, PROBLEM_LINES, Examination, examine
from udptun.doctor.endpoints import Endpoint
from udptun.doctor.facts import Facts, Peer, StoreView, gather
from udptun.doctor.finding import Finding, NotHereError, Severity
from udptun.doctor.probes import Echo, Echoes
from udptun.doctor.processes import Process, daemon_words, flanneld_in
from udptun.doctor.report import as_json, as_text
from udptun.doctor.sample import MOST, sample
from udptun.kernel import clock_sync
from udptun.kernel.cgroup import Limits
from udptun.kernel.clock_sync import _Timex, is_clock_synchronised
from udptun.kernel.ipsec import Policy
from udptun.stores.base import LEASE_TTL_S, Snapshot

PAGE = Path(__file__).resolve().parents[2] / "docs" / "doctor.md"
NOW_S = 1_800_000_000.0
TIME_ERROR = 5


def document(**changes: Any) -> dict[str, Any]:
    """Of a host that is well, with one peer."""
    peer = {"subnet": "10.244.7.0/24", "public_ip": "192.0.2.7", "port": 8285, "liveness": "alive", "path_mtu": 1472}
    return {
        "network": "10.244.0.0/16",
        "lease": {"subnet": "10.244.1.0/24", "public_ip": "192.0.2.1", "port": None, "expires_at": NOW_S + LEASE_TTL_S},
        "underlay": {"interface": "eth0", "address": "192.0.2.1", "mtu": 1500},
        "ipv6": None,
        "backend": {"type": "udp", "device": "flannel0", "mtu": 1472, "offloads": ["tso"]},
        "datapath": {"pid": 7, "standby_pids": [8], "workers": ["running"], "confinement": "full"},
        "peers": [peer],
        "skipped": [],
        "problems": [],
        **changes,
    }


def link(index: int, name: str, **more: Any) -> Link:
    return Link(index, name, "", 1500, is_up=True, has_carrier=True, is_loopback=False, tx_queue_len=0, **more)


def facts(said: dict[str, Any] | None = None, **changes: Any) -> Facts:
    found = Facts(
        parse_daemon_flags([], {}),
        Path("/nowhere"),
        (Path("/nowhere"),),
        document() if said is None else said,
        "",
        lambda: None,
        None,
        StoreView("local"),
        None,
        (),
        {1: link(1, "eth0"), 2: link(2, "flannel0", alias="udptun 10.244.0.0/16")},
        (),
        (),
        "",
        "6.12.1",
        NOW_S,
    )
    return replace(found, **changes)


async def causes(look: Any, of: Facts) -> list[str]:
    return [finding.cause for finding in await look(of)]


# --- the table


def test_page_has_a_row_for_each_check_and_the_same_words() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.*) \| (\w+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert rows[:-1] == [(it.name, it.looks_at, it.worst.word, it.remedy) for it in CHECKS]
    assert rows[-1][0] == PROBLEM_LINES


def test_page_and_changelog_say_how_many_checks_there_are() -> None:
    n = len(CHECKS) + 1
    assert f"{n} checks, " in PAGE.read_text()
    assert f"({n} checks:" in (PAGE.parents[1] / "CHANGELOG.md").read_text()


def test_each_check_is_tested_with_a_fault() -> None:
    """In the lab, or here where a host cannot be brought into that state."""
    tests = Path(__file__).read_text() + (PAGE.parents[1] / "tests" / "netns" / "test_doctor.py").read_text()
    calls = {it.name: f"{it.look.__module__.rpartition('.')[2]}.{it.look.__name__}" for it in CHECKS}
    assert [name for name, call in calls.items() if not re.search(rf'"{name}"|{call}[,(]', tests)] == []


def test_names_of_checks_are_different() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)


# --- checks


async def test_a_clock_that_is_behind_or_ahead_shows_by_our_lease() -> None:
    assert await causes(kernel.clock, facts()) == []
    (behind,) = await causes(kernel.clock, facts(now_s=NOW_S - 7200))
    assert "is behind" in behind
    (ahead,) = await causes(kernel.clock, facts(now_s=NOW_S + LEASE_TTL_S + 7200))
    assert "is ahead" in ahead
    (ancient,) = await causes(kernel.clock, facts(now_s=1000.0))
    assert "before 2025" in ancient


@pytest.mark.parametrize(
    ("flags", "is_kept", "is_said"),
    [
        (["--store=etcd"], False, True),
        (["--kube-subnet-mgr"], False, True),
        (["--store=etcd"], True, False),
        (["--store=local"], False, False),
    ],
)
async def test_a_clock_that_nobody_keeps_is_a_note_where_a_server_goes_by_clocks(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], is_kept: bool, is_said: bool
) -> None:
    """No test can do it to a machine: the kernel has one clock for all."""
    monkeypatch.setattr(kernel, "is_clock_synchronised", lambda: is_kept)
    found = await kernel.clock(facts(options=parse_daemon_flags(flags, {"NODE_NAME": "n1"})))
    assert [it.severity for it in found] == [Severity.NOTE] * is_said
    assert all("no NTP" in it.cause and "timedatectl set-ntp true" in it.remedy for it in found)


def test_the_kernel_says_whether_its_clock_is_kept() -> None:
    """adjtimex() itself returns TIME_ERROR for a clock that nobody keeps, so struct timex as we have it is right."""
    assert is_clock_synchronised() is (clock_sync._libc.adjtimex(ctypes.byref(_Timex())) != TIME_ERROR)


async def test_a_question_about_ntp_that_is_refused_keeps_nothing_else_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> bool:
        raise OSError(errno.EPERM, "")

    monkeypatch.setattr(kernel, "is_clock_synchronised", refuse)
    behind = facts(now_s=NOW_S - 7200, options=parse_daemon_flags(["--store=etcd"], {}))
    assert ["is behind" in it for it in await causes(kernel.clock, behind)] == [True]


async def test_a_kernel_that_corrupts_what_is_sent_is_a_note_and_an_error_where_it_is_used() -> None:
    assert await causes(kernel.kernel_version, facts()) == []
    (note,) = await kernel.kernel_version(facts(release="7.1.0"))
    assert note.severity is Severity.NOTE
    used = document(backend={**document()["backend"], "offloads": ["udp_segment"]})
    (error,) = await kernel.kernel_version(facts(used, release="7.1.0"))
    assert error.severity is Severity.ERROR
    assert "--offload-disabled=udp_segment" in error.remedy


async def test_a_datapath_without_process_worker_or_standby_is_named() -> None:
    assert await causes(daemon.datapath, facts()) == []
    none = {"pid": None, "standby_pids": [], "workers": ["stopped"], "confinement": None}
    assert await causes(daemon.datapath, facts(document(datapath=none))) == [
        "no datapath process runs, so no packet passes the tunnel"
    ]
    half = {"pid": 7, "standby_pids": [], "workers": ["running", "tun_lost"], "confinement": "full"}
    assert len(await causes(daemon.datapath, facts(document(datapath=half)))) == 2
    of_ipv6 = {"network": "fd00:244::/48", "datapath": none}
    assert await causes(daemon.datapath, facts(document(ipv6=of_ipv6))) == [
        "no datapath process of IPv6 runs, so no packet passes the tunnel"
    ]


@pytest.mark.parametrize(
    ("shortcut", "rule", "is_said"),
    [("on", "a firewall rule names UDP port 8285: `x`", True), ("on", "", False), ("off", "a firewall rule", False)],
)
async def test_rules_that_the_shortcut_passes_by_are_a_note(
    monkeypatch: pytest.MonkeyPatch, shortcut: str, rule: str, is_said: bool
) -> None:
    async def find_objection(port: int, link: str | None) -> str:
        return rule if (port, link) == (8285, "eth0") else ""

    async def no_policies() -> list[Policy]:
        return []

    monkeypatch.setattr(firewall, "find_objection", find_objection)
    monkeypatch.setattr(firewall, "read_policies", no_policies)
    said = document()
    said["lease"]["port"] = 8285
    said["datapath"]["shortcut"] = shortcut
    found = await firewall.rules_passed_by(facts(said))
    assert [it.severity for it in found] == [Severity.NOTE] * is_said
    assert all("this host's rules say" in it.cause and rule in it.cause for it in found)
    del said["datapath"]["shortcut"]
    assert await firewall.rules_passed_by(facts(said)) == []


async def test_an_ipsec_policy_that_the_shortcut_passes_by_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tunnel's packets left in clear text, and nothing said so."""
    said = document()
    said["lease"]["port"] = 8285
    said["datapath"]["shortcut"] = "on"

    async def no_objection(_port: int, _link: str | None) -> str:
        return ""

    async def one_policy() -> list[Policy]:
        own = IPv4Network(said["underlay"]["address"])
        return [Policy("out", own, IPv4Network("0.0.0.0/0"), 17, (0, 0), (8285, 0xFFFF))]

    monkeypatch.setattr(firewall, "find_objection", no_objection)
    monkeypatch.setattr(firewall, "read_policies", one_policy)
    of_peers = facts(said)
    (found,) = await firewall.rules_passed_by(of_peers)
    assert (found.severity, found.subject) == (Severity.WARNING, "shortcut")
    assert "in clear text whatever IPsec says" in found.cause


@pytest.mark.parametrize(
    ("state", "passed", "is_said"),
    [
        ("on", {"decap_super": 5}, False),
        ("off: no peer has sent a super-packet yet", {}, False),
        ("off: flannel0-gso is gone", {"decap_super": 5}, True),
    ],
)
async def test_super_packets_without_a_detour_are_a_note(
    monkeypatch: pytest.MonkeyPatch, state: str, passed: dict[str, int], is_said: bool
) -> None:
    async def nothing(*_of: object) -> list[Policy]:
        return []

    monkeypatch.setattr(firewall, "find_objection", nothing)
    monkeypatch.setattr(firewall, "read_policies", nothing)
    said = document()
    said["lease"]["port"] = 8285
    said["datapath"] |= {"shortcut": "on", "shortcut_detour": {"state": state}, "shortcut_passed": passed}
    found = await firewall.rules_passed_by(facts(said))
    assert [it.severity for it in found] == [Severity.NOTE] * is_said
    assert all("flannel0-gso is gone" in it.cause for it in found)


async def test_an_mtu_that_the_underlay_does_not_take_is_named() -> None:
    small = {1: replace(link(1, "eth0"), mtu=1400)}
    (finding,) = await paths.mtu_in_use(facts(links=small, document=document()))
    assert finding.severity is Severity.WARNING
    assert "1472 bytes, 1500 on eth0, and that takes 1400" in finding.cause


async def test_a_route_of_others_to_a_peer_is_an_error_and_one_to_nobody_a_warning() -> None:
    routes = (
        Route(ip_network("10.244.7.0/24"), ip_address("192.0.2.7"), 1, protocol=4),
        Route(ip_network("10.244.9.0/24"), None, 1, protocol=4),
        Route(ip_network("10.0.0.0/8"), None, 1, protocol=4),
        Route(ip_network("10.244.0.0/16"), None, 2),
    )
    found = await others.foreign_routes(facts(routes=routes))
    assert [(it.severity, it.subject) for it in found] == [
        (Severity.ERROR, "10.244.7.0/24"),
        (Severity.WARNING, "10.244.9.0/24"),
    ]
    assert "`ip route delete 10.244.7.0/24 via 192.0.2.7 dev eth0 proto 4`" in found[0].remedy


async def test_a_bridge_of_an_earlier_lease_is_named() -> None:
    bridge = {**facts().links, 3: replace(link(3, "cni0"), kind="bridge")}
    old = Address(3, ip_address("10.244.5.1"), 24)
    (finding,) = await others.overlapping_networks(facts(links=bridge, addresses=(old,)))
    assert "`ip link delete cni0`" in finding.remedy
    own = Address(3, ip_address("10.244.1.1"), 24)
    assert await causes(others.overlapping_networks, facts(links=bridge, addresses=(own,))) == []


async def test_lines_of_the_daemon_that_a_check_has_found_are_not_said_twice() -> None:
    line = "net.ipv4.ip_forward is 0, so no packet passes; run `sysctl`"
    dead = "the host of 10.244.7.0/24 at 192.0.2.7 has answered and does not any more; is it up?"
    said = facts(document(problems=[line, dead, "something else"]))
    assert [it.cause for it in daemon.problem_lines(said, [])] == [
        "net.ipv4.ip_forward is 0, so no packet passes",
        "the host of 10.244.7.0/24 at 192.0.2.7 has answered and does not any more",
        "something else",
    ]
    found = [
        ("forwarding", Finding.of_line(Severity.ERROR, line)),
        ("reachability", Finding(Severity.ERROR, "10.244.7.0/24", "x", "y")),
    ]
    assert [it.cause for it in daemon.problem_lines(said, found)] == ["something else"]


async def test_lines_about_other_peers_than_those_that_a_check_has_found_are_kept() -> None:
    """Before, one peer that a check had found hid the lines about all others."""
    dead = "the host of {} has answered and does not any more, nothing has come from it since 12:00:00"
    narrow = "the path to the host of {} takes packets of 1300 bytes, 172 fewer than flannel0"
    one, other = "10.244.7.0/24 at 192.0.2.7", "10.244.70.0/24 at 192.0.2.70"
    said = facts(document(problems=[dead.format(one), dead.format(other), narrow.format(one), narrow.format(other)]))
    found = [(name, Finding(Severity.ERROR, one, "x", "y")) for name in ("reachability", "path-mtu")]
    assert [it.cause for it in daemon.problem_lines(said, found)] == [dead.format(other), narrow.format(other)]
    assert len(daemon.problem_lines(said, found[:1])) == 3


async def test_remedy_for_strict_rp_filter_of_a_link_with_a_dot_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it was written with dots, which sysctl takes for the setting of a link flannel/1."""

    class Kernel:
        async def __aenter__(self) -> Kernel:
            return self

        async def __aexit__(self, *_: object) -> None: ...

        async def routes_to(self, _: object) -> dict[object, Route]:
            return {}

    monkeypatch.setattr("udptun.doctor.kernel.Netlink", Kernel)
    monkeypatch.setattr("udptun.doctor.kernel.read_sysctl", lambda path: "1" if "/flannel.1/" in path else "0")
    vtep = document(backend={**document()["backend"], "type": "vxlan", "device": "flannel.1"})
    (finding,) = await kernel.reverse_path(facts(vtep))
    assert finding.remedy.startswith("`sysctl -w net/ipv4/conf/flannel.1/rp_filter=2`")


async def test_a_lease_store_that_may_not_be_looked_at_is_an_error_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the state directory of root ended another user's `udptun doctor` with a traceback."""
    path, stat = tmp_path / "leases.db", Path.stat

    def refuse(self: Path, **how: Any) -> Any:
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return stat(self, **how)

    monkeypatch.setattr(Path, "stat", refuse)
    found = await gather(parse_doctor_flags([f"--store=local:{path}"], {}), None, "", lambda: None, None)
    (finding,) = await store.store(found)
    assert finding.cause == f"the lease store {path} cannot be looked at (Permission denied)"
    assert finding.remedy == "run as root"


async def test_directories_and_dangling_links_are_no_cni_configurations(tmp_path: Path) -> None:
    """Before, one that is named so and comes first was said to take flannel's place."""
    (tmp_path / "00-old.conf").mkdir()
    (tmp_path / "01-gone.conflist").symlink_to(tmp_path / "nothing")
    (tmp_path / "10-flannel.conflist").write_text('{"plugins": [{"type": "flannel"}]}')
    assert await causes(files.cni_configuration, facts(cni_conf_dir=tmp_path)) == []


async def test_a_node_of_kubernetes_without_flannels_configuration_is_named(tmp_path: Path) -> None:
    """Its pods get addresses of another plugin, and the check did not apply.

    It does not where the directory is empty, as in the daemon's own container.
    """
    kube = parse_daemon_flags(["--kube-subnet-mgr"], {"NODE_NAME": "n1"})
    with pytest.raises(NotHereError):
        await files.cni_configuration(facts(options=kube, cni_conf_dir=tmp_path))
    (tmp_path / "10-other.conflist").write_text('{"plugins": [{"type": "bridge"}]}')
    (finding,) = await files.cni_configuration(facts(options=kube, cni_conf_dir=tmp_path))
    assert (finding.severity, "install-cni" in finding.remedy) == (Severity.ERROR, True)
    with pytest.raises(NotHereError):
        await files.cni_configuration(facts(cni_conf_dir=tmp_path))


async def test_a_store_that_fails_is_an_error_with_what_to_do() -> None:
    (finding,) = await store.store(facts(store=StoreView("etcd", error="etcd: connection refused")))
    assert finding.severity is Severity.ERROR
    assert "is the server up" in finding.remedy
    (finding,) = await store.network_config(facts(conf_problems=("Network: missing",)))
    assert finding.cause == "Network: missing"


async def test_without_a_daemon_what_needs_one_does_not_apply() -> None:
    silent = facts(document=None, silence="no udptun daemon answers at /run/x; is it running?")
    with pytest.raises(NotHereError):
        await daemon.datapath(silent)
    (finding,) = await daemon.daemon(silent)
    assert finding.cause == "no udptun daemon answers at /run/x"
    assert finding.remedy.startswith("is it running?")


async def test_limits_of_the_daemons_cgroup_are_named_as_the_daemon_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotHereError):
        await kernel.cgroup_limits(facts())
    asked: list[Path] = []

    def limits(proc: Path) -> Limits:
        asked.append(proc)
        return Limits(0.1, 50 << 20)

    monkeypatch.setattr("udptun.doctor.kernel.cgroup.read_limits", limits)
    found = await kernel.cgroup_limits(facts(daemon_pid=77))
    assert asked == [Path("/proc/77")]
    assert [it.severity for it in found] == [Severity.WARNING] * 2
    assert "resources.limits" in f"{found[0].remedy} {found[1].remedy}"


async def test_ipv6_that_the_kernel_lacks_is_named_where_it_is_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    both = parse_net_conf('{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:1::/48"}', "x")
    alone = parse_net_conf('{"Network": "10.244.0.0/16"}', "x")
    monkeypatch.setattr("udptun.doctor.kernel.read_sysctl", lambda path: None)
    (finding,) = await kernel.ipv6_in_kernel(facts(conf=both))
    assert finding.remedy == "boot it without ipv6.disable=1"
    with pytest.raises(NotHereError):
        await kernel.ipv6_in_kernel(facts(conf=alone))
    monkeypatch.setattr("udptun.doctor.kernel.read_sysctl", lambda path: "0")
    assert await causes(kernel.ipv6_in_kernel, facts(conf=both)) == []


async def test_a_pod_cidr_that_is_missing_or_another_one_is_named() -> None:
    kube = parse_daemon_flags(["--kube-subnet-mgr"], {"NODE_NAME": "n1"})

    def lease(subnet: str) -> Lease:
        return Lease(Subnets(IPv4Network(subnet)), LeaseAttrs(IPv4Address("192.0.2.1")), None, 1, node_name="n1")

    def view(*leases: Lease, lack: str = "") -> StoreView:
        return StoreView("kube", None, Snapshot(1, leases), "", "n1", lack)

    same = facts(options=kube, store=view(lease("10.244.1.0/24")))
    assert await causes(store.pod_cidr, same) == []
    (other,) = await store.pod_cidr(facts(options=kube, store=view(lease("10.244.9.0/24"))))
    assert other.cause == "the podCIDR of node n1 is 10.244.9.0/24, and the daemon runs with 10.244.1.0/24"
    (bare,) = await store.pod_cidr(facts(options=kube, store=view()))
    assert "not the annotations of a lease" in bare.cause
    (none,) = await store.pod_cidr(facts(options=kube, store=view(lack="node n1: it has no podCIDR; give it one")))
    assert (none.cause, none.remedy) == ("node n1: it has no podCIDR", "give it one")
    with pytest.raises(NotHereError, match="pod-cidr"):
        await store.own_lease(facts(options=kube, store=view(lack="node n1: it has no podCIDR; give it one")))


@pytest.mark.parametrize(
    ("files", "is_named"),
    [
        ({"10-eth.network": "[Match]\nName=eth*\n[Network]\nDHCP=yes\n"}, False),
        ({"99-all.network": "[Match]\nName=*\n[Network]\nDHCP=yes\n"}, True),
        ({"99-all.network": "[Match]\n[Network]\nDHCP=yes\n"}, True),
        ({"99-all.network": "[Match]\nName=*\n", "50-pods.network": "[Match]\nName=flannel* cni*\n"}, False),
        ({"80-wired.network": "[Match]\nType=ether\n"}, False),
    ],
)
async def test_networkd_is_named_where_a_file_of_it_takes_every_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], is_named: bool
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("udptun.doctor.others._NETWORKD_DIRS", (tmp_path,))
    running = [Process(9, "systemd-network", ("/usr/lib/systemd/systemd-networkd",), True)]
    monkeypatch.setattr("udptun.doctor.others.processes", lambda: iter(running))
    found = await others.network_managers(facts())
    assert bool(found) == is_named
    assert all("Unmanaged=yes" in it.remedy for it in found)


async def test_network_manager_is_a_note_unless_it_is_told_to_leave_our_device_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("udptun.doctor.others._NM_DIRS", (tmp_path,))
    running = [Process(9, "NetworkManager", ("/usr/sbin/NetworkManager",), True)]
    monkeypatch.setattr("udptun.doctor.others.processes", lambda: iter(running))
    (finding,) = await others.network_managers(facts())
    assert finding.severity is Severity.NOTE
    (tmp_path / "a.conf").write_text("# flannel\n")
    assert await others.network_managers(facts()) == [finding]
    (tmp_path / "b.conf").write_text("[keyfile]\nunmanaged-devices=interface-name:flannel*\n")
    assert await others.network_managers(facts()) == []


# --- packet filters


def test_the_tunnels_path_is_that_of_the_daemons_document() -> None:
    (path,) = firewall.tunnel_paths(facts(document(lease={**document()["lease"], "port": 9000})))
    assert path == TunnelPath("eth0", ip_address("192.0.2.1"), 9000, (ip_address("192.0.2.7"),), 8285, True)
    vxlan = document(backend={**document()["backend"], "type": "vxlan"})
    assert firewall.tunnel_paths(facts(vxlan)) == []
    conf = parse_net_conf('{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "Port": 4789}}', "x")
    (path,) = firewall.tunnel_paths(facts(vxlan, conf=conf))
    assert (path.port, path.looks_answered) == (4789, False)
    bare = document(backend=vxlan["backend"], peers=[{**document()["peers"][0], "port": None}])
    assert [peer.port for peer in facts(bare, conf=conf).peers] == [4789]
    direct = parse_net_conf('{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "DirectRouting": true}}', "x")
    assert firewall.tunnel_paths(facts(vxlan, conf=direct)) == []


def test_policies_are_asked_about_all_peers_and_rules_about_some() -> None:
    """A policy about a peer beyond the first hundred was not named."""
    one = document()["peers"][0]
    peers = [{**one, "subnet": f"10.244.{i}.0/24", "public_ip": f"192.0.2.{i}"} for i in range(2, 202)]
    many = facts(document(lease={**document()["lease"], "port": 8285}, peers=peers))
    ((some,), (whole,)) = firewall.tunnel_paths(many), firewall.tunnel_paths(many, to_all=True)
    assert (len(some.peers), len(whole.peers)) == (100, 200)


def test_without_a_daemon_the_tunnels_path_is_that_of_our_lease_in_the_store() -> None:
    ours, other = (
        Lease(Subnets(IPv4Network(subnet)), LeaseAttrs(IPv4Address(ip)), NOW_S + 100, 1)
        for subnet, ip in (("10.244.1.0/24", "192.0.2.1"), ("10.244.7.0/24", "192.0.2.7"))
    )
    of = facts(
        document=None,
        conf=parse_net_conf('{"Network": "10.244.0.0/16"}', "x"),
        store=StoreView("local", snapshot=Snapshot(1, (ours, other))),
        addresses=(Address(1, IPv4Address("192.0.2.1"), 24),),
    )
    (path,) = firewall.tunnel_paths(of)
    assert path == TunnelPath("eth0", ip_address("192.0.2.1"), 8285, (ip_address("192.0.2.7"),), 8285, True)


@pytest.mark.parametrize(
    ("line", "severity"),
    [
        ("rule 1 of INPUT (x, table filter) drops packets of peers to UDP port 8285 here; delete it", 3),
        ("rule 1 of c (x) drops some IPv6 packets of peers to UDP port 1 here unless this host has just sent; y", 2),
        ("the policy of c (x) rejects packets from here to UDP port 1 of peers unless they have just sent to us; y", 2),
        ("rule 1 of FORWARD (x, table filter) rejects some IPv6 packets between pods here and other hosts; y", 3),
        ("the standby datapath process 7 is stopped by a signal; y", 2),
    ],
)
def test_how_bad_a_problem_line_is(line: str, severity: int) -> None:
    assert daemon.severity_of(line) == severity


# --- the store's servers


async def test_a_server_of_the_store_that_lacks_or_is_slow_is_a_warning_while_another_answers() -> None:
    well, slow = Endpoint("http://a:2379", 0.001), Endpoint("http://b:2379", 0.7)
    away = Endpoint("http://c:2379", None, "connection refused")
    found = await store.store_endpoints(facts(endpoints=(well, slow, away)))
    assert [(it.severity, it.subject) for it in found] == [(2, "http://b:2379"), (2, "http://c:2379")]
    assert "takes 700 ms for a small answer, and more than 500 is slow" in found[0].cause
    assert "connection refused" in found[1].cause
    assert await store.store_endpoints(facts(endpoints=(well,))) == []
    for it in ((), (away,)):
        with pytest.raises(NotHereError):
            await store.store_endpoints(facts(endpoints=it))


# --- peers


def many(n: int, dead: Iterable[int] = ()) -> list[Peer]:
    gone = set(dead)
    return [
        Peer(
            ip_network((0x0A000000 + (i << 8), 24)),
            ip_address(0x0B000000 + i),
            ip_address(0x0A000000 + (i << 8)),
            liveness="dead" if i in gone else "alive",
        )
        for i in range(n)
    ]


def test_all_of_a_hundred_peers_are_asked_and_of_ten_thousand_a_sample_with_the_dead_ones() -> None:
    few = sample(many(MOST))
    assert len(few.chosen) == MOST
    assert str(few) == "100 peers"
    large = sample(many(10_000, dead=(17, 9_876)))
    assert len(large.chosen) == len(set(large.chosen)) == MOST
    assert sum(peer.liveness == "dead" for peer in large.chosen) == 2
    assert str(large) == "a sample of 100 of 10000 peers"
    assert len(sample(many(10_000, dead=range(5_000))).chosen) == MOST


PEER = ip_address("192.0.2.7")
INNER, OUTER = Echo(ip_address("10.244.7.0")), Echo(PEER)


@pytest.mark.parametrize(
    ("answered", "refused", "closed", "liveness", "received", "severity", "cause"),
    [
        ({INNER}, {}, {}, "alive", (5, 5), None, ""),
        (set(), {OUTER: OSError(errno.ENETUNREACH, "")}, {}, "dead", (5, 5), 3, "cannot be sent (ENETUNREACH)"),
        (
            {OUTER},
            {},
            {(PEER, 8285): "ECONNREFUSED"},
            "dead",
            (5, 5),
            3,
            "nobody listens on its UDP port 8285",
        ),
        ({OUTER}, {}, {(PEER, 8285): "EPERM"}, "dead", (5, 5), 3, "does not let datagrams to its UDP port 8285 out"),
        ({OUTER}, {}, {(PEER, 8285): "EHOSTUNREACH"}, "dead", (5, 5), 3, "refused on the way (EHOSTUNREACH)"),
        (set(), {}, {}, "dead", (5, 5), 3, "neither through the tunnel nor to a ping"),
        ({OUTER}, {}, {}, "dead", (5, 9), 3, "packets of it arrive here"),
        ({OUTER}, {}, {}, "unknown", (0, 0), 3, "has never answered through the tunnel"),
        ({OUTER}, {}, {}, "unknown", (5, 5), 2, "though packets of its pods arrive"),
        ({OUTER}, {}, {}, "dead", (5, 5), 3, "nothing comes from it through the tunnel"),
    ],
)
async def test_what_came_back_from_a_peer_says_where_packets_are_lost(
    monkeypatch: pytest.MonkeyPatch,
    answered: set[Echo],
    refused: dict[Echo, OSError],
    closed: dict[Any, str],
    liveness: str,
    received: tuple[int, int],
    severity: int | None,
    cause: str,
) -> None:
    async def ask(questions: object) -> Echoes:
        return Echoes(answered, refused)

    async def find_closed(remotes: object) -> dict[Any, str]:
        return closed

    monkeypatch.setattr("udptun.doctor.paths.ask_echoes", ask)
    monkeypatch.setattr("udptun.doctor.paths.find_closed_ports", find_closed)
    before, now = (
        document(peers=[{**document()["peers"][0], "liveness": liveness, "decap_packets": n}]) for n in received
    )
    found = await paths.reachability(facts(before, ask_again=lambda: now))
    assert [it.severity for it in found] == ([] if severity is None else [severity])
    assert all(cause in it.cause and it.remedy for it in found)


async def test_both_subnets_of_a_host_that_is_cut_off_are_one_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of both families was said to be away twice."""

    async def ask(questions: object) -> Echoes:
        return Echoes()

    async def find_closed(remotes: object) -> dict[Any, str]:
        return {}

    monkeypatch.setattr("udptun.doctor.paths.ask_echoes", ask)
    monkeypatch.setattr("udptun.doctor.paths.find_closed_ports", find_closed)
    peers = [{"subnet": "fd00:244::7:0/112", "public_ip": "192.0.2.7", "port": 8285, "liveness": "dead"}]
    own = {"network": "fd00:244::/48", "subnet": "fd00:244::1:0/112", "device": "flannel0", "mtu": 1472}
    of = facts(document(ipv6={**own, "peers": peers}), ask_again=document)
    (finding,) = await paths.reachability(of)
    assert finding.subject == "10.244.7.0/24 and fd00:244::7:0/112 at 192.0.2.7"
    line = "the host of 10.244.7.0/24 at 192.0.2.7 has answered and does not any more; is it up"
    of = facts(document(problems=[line]))
    assert daemon.problem_lines(of, [("reachability", finding)]) == []


async def test_a_peer_that_answers_short_packets_alone_has_a_narrow_path(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(questions: object) -> Echoes:
        return Echoes({INNER})

    monkeypatch.setattr("udptun.doctor.paths.ask_echoes", ask)
    peer = {**document()["peers"][0], "path_mtu": 1400}
    (finding,) = await paths.path_mtu(facts(document(peers=[peer])))
    assert finding.cause == "packets of 1472 bytes do not reach it and come back, and those of 1400 do"
    assert finding.severity is Severity.WARNING


async def test_thousands_of_peers_and_of_routes_cost_little() -> None:
    """Before, each look at a route of others made all peers anew."""
    peers = [
        {"subnet": str(it.subnet), "public_ip": str(it.public_ip), "port": 8285, "liveness": "alive"}
        for it in many(2_000)
    ]
    routes = tuple(Route(ip_network((0x0AF40000 + (i << 8), 24)), None, 1, protocol=4) for i in range(200))
    of = facts(document(network="10.0.0.0/8", peers=peers), routes=routes)
    assert of.peers is of.peers
    began_s = time.process_time()
    await others.foreign_routes(of)
    await others.leftover_routes(of)
    await kernel.reverse_path(of)
    assert time.process_time() - began_s < 5


def test_peers_of_both_families_are_asked_at_the_addresses_that_answer() -> None:
    ipv6 = {
        "network": "fd00:244::/48",
        "subnet": "fd00:244::1:0/112",
        "device": "flannel0",
        "mtu": 1472,
        "peers": [{"subnet": "fd00:244::7:0/112", "public_ip": "192.0.2.7", "port": 8285, "liveness": "alive"}],
    }
    found = facts(document(ipv6=ipv6)).peers
    assert [str(peer.inner) for peer in found] == ["10.244.7.0", "fd00:244::7:0"]
    bare = document(backend={**document()["backend"], "type": "host-gw", "device": None})
    assert [str(peer.inner) for peer in facts(bare).peers] == ["192.0.2.7"]


# --- running and printing


async def test_a_check_that_cannot_look_keeps_no_other_from_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(_: Facts) -> list[Finding]:
        raise OSError("no")

    async def hangs(_: Facts) -> list[Finding]:
        await asyncio.sleep(60)
        return []

    async def finds(_: Facts) -> list[Finding]:
        return [Finding(Severity.NOTE, "", "a", "b"), Finding(Severity.WARNING, "", "c", "d")]

    checks = tuple(replace(check, look=look) for check, look in zip(CHECKS, (fails, hangs, finds), strict=False))
    monkeypatch.setattr("udptun.doctor.checks.CHECKS", checks)
    monkeypatch.setattr("udptun.doctor.checks._CHECK_S", 0.01)
    found = await examine(facts())
    assert [it.cause for _, it in found.findings] == ["c", "a"]
    assert found.not_looked_at == {checks[0].name: "it could not look: no", checks[1].name: "it took more than 0 s"}
    assert found.exit_status == 1


async def test_a_fault_of_ours_in_a_check_is_logged_and_keeps_no_other_from_looking(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, an exception that nobody had thought of ended the command, and nothing was said of all the rest."""

    async def fails(_: Facts) -> list[Finding]:
        raise KeyError("port")

    async def finds(_: Facts) -> list[Finding]:
        return [Finding(Severity.WARNING, "", "c", "d")]

    checks = tuple(replace(check, look=look) for check, look in zip(CHECKS, (fails, finds), strict=False))
    monkeypatch.setattr("udptun.doctor.checks.CHECKS", checks)
    found = await examine(facts({key: it for key, it in document().items() if key != "problems"}))
    assert [it.cause for _, it in found.findings] == ["c"]
    assert found.not_looked_at == {
        checks[0].name: "it could not look: KeyError: 'port'",
        PROBLEM_LINES: "it could not look: KeyError: 'problems'",
    }
    assert [it.exc_info is not None for it in caplog.records] == [True, True]


def examination(*severities: Severity) -> Examination:
    findings = tuple(("forwarding", Finding(it, "eth0", "it is off", "switch it on")) for it in severities)
    endpoints = (Endpoint("http://192.0.2.1:2379", 0.0012), Endpoint("http://192.0.2.2:2379", None, "refused"))
    return Examination(findings, {"pod-cidr": "only Kubernetes gives podCIDRs"}, 36, "3 peers", endpoints)


def test_text_has_problems_first_two_lines_each_and_colour_on_a_terminal_only() -> None:
    text = as_text(examination(Severity.ERROR, Severity.NOTE), with_all=False, with_colour=False)
    assert text.splitlines() == [
        "error    forwarding: eth0: it is off",
        "         -> switch it on",
        "note     forwarding: eth0: it is off",
        "         -> switch it on",
        "",
        "36 checks, 3 peers asked: 1 error, 1 note; 1 does not apply here (--all says why)",
    ]
    assert "\33" in as_text(examination(Severity.ERROR), with_all=False, with_colour=True)
    whole = as_text(examination(), with_all=True, with_colour=False)
    assert "ok       clock: " in whole
    assert "-        pod-cidr: not looked at: only Kubernetes gives podCIDRs" in whole
    assert "         http://192.0.2.1:2379 answers in 1.2 ms\n         http://192.0.2.2:2379 does not answer\n" in whole
    assert whole.splitlines()[-1] == "36 checks, 3 peers asked: nothing wrong; 1 does not apply here"


def test_text_is_broken_between_words_on_a_terminal_and_nowhere_else() -> None:
    """The terminal broke it, in the middle of words and to its edge."""
    finding = Finding(Severity.ERROR, "", "no packet passes between pods here and other hosts", "run `sysctl -w a=1`")
    it = Examination((("forwarding", finding),), {}, 35, "3 peers")
    assert as_text(it, with_all=False, with_colour=False, width=44).splitlines()[:4] == [
        "error    forwarding: no packet passes",
        "         between pods here and other hosts",
        "         -> run `sysctl -w a=1`",
        "",
    ]
    assert "no packet passes between pods here and other hosts\n" in as_text(it, with_all=False, with_colour=False)


@pytest.mark.parametrize(
    ("environ", "coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({}, False)],
)
def test_a_terminal_that_does_not_say_what_it_is_gets_no_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environ: dict[str, str], coloured: bool
) -> None:
    """It got them from doctor and none from status."""

    async def look(*_: object) -> Examination:
        return examination(Severity.ERROR)

    monkeypatch.setattr(doctor, "_look", look)
    monkeypatch.setattr(doctor, "find_pid", lambda run_dir: None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    doctor.run([], environ)
    assert ("\33" in capsys.readouterr().out) is coloured


def test_text_names_ten_findings_of_a_check_and_counts_the_others() -> None:
    text = as_text(examination(*[Severity.ERROR] * 12), with_all=False, with_colour=False)
    assert text.count("-> switch it on") == 10
    assert "         ... and 2 more of forwarding (--all shows them)" in text.splitlines()
    assert "12 errors" in text
    assert as_text(examination(*[Severity.ERROR] * 12), with_all=True, with_colour=False).count("->") == 12


def test_json_has_every_check_once_and_the_keys_of_the_page() -> None:
    said = json.loads(as_json(examination(Severity.WARNING)))
    named = {said["findings"][0]["check"], *said["fine"], *said["not_looked_at"]}
    assert named == {*(check.name for check in CHECKS), PROBLEM_LINES}
    assert said["exit_status"] == 1
    lists = {name: said[name][0] for name in ("findings", "store_endpoints")}
    keys = [*said, *(f"{name}[].{key}" for name, row in lists.items() for key in row)]
    table = PAGE.read_text().partition("## For programs")[2]
    assert sorted(re.findall(r"^\| `([\w.\[\]]+)` \|", table, re.MULTILINE)) == sorted(keys)


@pytest.mark.parametrize(("severities", "status"), [((), 0), ((1,), 0), ((1, 2), 1), ((2, 3), 2)])
def test_exit_status_is_by_the_worst(severities: tuple[int, ...], status: int) -> None:
    assert examination(*map(Severity, severities)).exit_status == status


def test_what_others_wrote_cannot_command_the_terminal() -> None:
    assert "\33" not in Finding(Severity.NOTE, "\33[2J", "a\nb", "c").subject


# --- the daemon's flags


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/usr/bin/python3 -m udptun daemon --store etcd", (False, ["--store", "etcd"])),
        ("/usr/bin/python3 /usr/bin/udptun daemon", (False, [])),
        ("/usr/bin/python3 /opt/bin/flanneld --ip-masq --kube-subnet-mgr", (True, ["--ip-masq", "--kube-subnet-mgr"])),
        ("/usr/bin/python3 -I /usr/bin/flanneld -v 1", (True, ["-v", "1"])),
        ("/opt/bin/flanneld --ip-masq", None),
        ("/usr/bin/python3 -m udptun status", None),
        ("bash", None),
    ],
)
def test_flags_of_a_daemon_are_read_off_its_command_line(line: str, found: object) -> None:
    assert daemon_words(line.split()) == found


def test_flannels_own_program_is_known_by_its_name() -> None:
    assert flanneld_in(["/opt/bin/flanneld", "--kube-subnet-mgr"])
    assert not flanneld_in(["/usr/bin/python3", "/opt/bin/flanneld"])
    assert not flanneld_in([])


def test_doctor_takes_the_daemons_flags_and_its_own() -> None:
    request = parse_doctor_flags(["--run-dir=/r", "--json", "--cni-conf-dir", "/host/cni"], {"FLANNELD_MTU": "1400"})
    assert request.options.run_dir == Path("/r")
    assert request.options.mtu == 1400
    assert (request.json, request.all) == (True, False)
    assert (request.cni_conf_dir, request.cni_bin_dir) == (Path("/host/cni"), Path("/opt/cni/bin"))


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("--ip-masq --iface eth0", "--ip-masq --iface eth0"),
        ("--ip-masq true --iface eth0", "--ip-masq"),
        ("--ip-masq -- --iface eth0", "--ip-masq"),
        ("--iface -- eth1", "--iface --"),
        ("true", ""),
    ],
)
def test_flags_behind_a_stray_word_of_the_running_flanneld_are_not_its_own(line: str, flags: str) -> None:
    """Before, flags given to the doctor were put behind that word, and so ignored with the rest."""
    assert flags_of_flanneld(line.split()) == flags.split()


def test_flags_of_the_doctor_count_where_the_running_flanneld_has_a_stray_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("/usr/bin/python3", "/opt/bin/flanneld", "--ip-masq", "true", "--etcd-prefix=/x")
    monkeypatch.setattr("udptun.commands.doctor.find_pid", lambda _: 7)
    monkeypatch.setattr("udptun.commands.doctor.words_of", lambda _: words)
    monkeypatch.setattr("udptun.commands.doctor.environment_of", lambda _: {})
    asked: list[DoctorRequest] = []

    async def look(request: DoctorRequest, _: int) -> Examination:
        asked.append(request)
        return examination()

    monkeypatch.setattr("udptun.commands.doctor._look", look)
    assert doctor.run(["--json", "--cni-conf-dir=/c"], {}) == 0
    assert json.loads(capsys.readouterr().out)["exit_status"] == 0
    (request,) = asked
    assert (request.json, request.cni_conf_dir, request.options.ip_masq) == (True, Path("/c"), True)
    assert request.options.etcd.prefix != "/x"

"""The shortcut between hosts: pods speak through the kernel, and the workers are always there to go on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from shortcut_labs import ATTACHED_BY, reload, started_lab, wait_until_on
from traffic import (
    CLEANUP,
    datapath_pids,
    is_answered,
    kill,
    ping,
    read_status,
    socket_in,
    tcp_flow,
    udp_flow,
)

from udptun.datapath.shortcut.programs import find_lack
from udptun.kernel.veth import pair_names
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import DEFAULT_NET_CONF, LEASES, Lab, Offload

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(find_lack()), reason=find_lack())]

_UDP_SEGMENT = 103
LIMIT_S = 15
"""For the switch at both hosts, which takes some tenths of a second."""
NETWORK = str(DEFAULT_NET_CONF["Network"])
PROGRAMS = {f"udptun {NETWORK} {name}" for name in ("decap", "encap")}
"""Filters, on kernels without tcx, and those that `filters` sees."""


@pytest.fixture(scope="module", params=ATTACHED_BY)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with started_lab("c", request.param, Offload.NONE) as lab:
        yield lab


@pytest.fixture(scope="module")
def filter_lab() -> Iterator[Lab]:
    """As on kernels without tcx, where programs outlive the daemon."""
    with started_lab("c", "clsact", Offload.NONE) as lab:
        yield lab


def state(host: Host) -> str:
    return str(read_status(host)["datapath"]["shortcut"])


def by_kernel(host: Host) -> dict[str, int]:
    """Of all counters what no worker has counted."""
    document = read_status(host)
    rows = document["datapath"]["worker_counters"]
    return {name: n - sum(row.get(name, 0) for row in rows) for name, n in document["counters"].items()}


def mtus(lab: Lab) -> set[int]:
    """Of the pairs of all hosts: each is made with the MTU that the shortcut is on with."""
    near, _ = pair_names("flannel0")
    found = [re.search(rf"{near}@.* mtu (\d+)", host.run(["ip", "-o", "link"]).stdout) for host in lab.hosts]
    return {int(it[1]) if it else 0 for it in found}


def is_clean(host: Host) -> bool:
    links = host.run(["ip", "-o", "link"]).stdout
    return not any(name in links for name in pair_names("flannel0")) and not filters(host) & PROGRAMS


def filters(host: Host) -> set[str]:
    """The names of ours on the underlay and on the device."""
    places = [(device, hook) for device in ("eth0", "flannel0") for hook in ("ingress", "egress")]
    shown = [host.run(["tc", "filter", "show", "dev", *it], check=False).stdout for it in places]
    return set(re.findall(r"udptun \S+ \w+", "".join(shown)))


def has_clsact(host: Host, device: str = "eth0") -> bool:
    return "clsact" in host.run(["tc", "qdisc", "show", "dev", device]).stdout


def by_workers(host: Host) -> int:
    """Packets that the workers were given to send: those that the kernel has sent the device does not count."""
    return int(host.run(["cat", "/sys/class/net/flannel0/statistics/tx_packets"]).stdout)


def test_pods_speak_through_the_kernel_and_every_packet_is_counted(lab: Lab) -> None:
    one, two = lab.hosts
    before = by_kernel(one)
    with (
        tcp_flow(one.pods[0], two.pods[0]) as to_two,
        tcp_flow(two.pods[0], one.pods[0], port=5003) as to_one,
        udp_flow(one.pods[0], two.pods[0], 500) as datagrams,
    ):
        wait_until("the counters", lambda: by_kernel(one)["encap_sent"] - before["encap_sent"] > 1000, LIMIT_S)
    to_two.report.assert_exact()
    to_one.report.assert_exact()
    assert not datagrams.report.lost
    assert not datagrams.report.n_spoilt
    time.sleep(1.2)
    counters = read_status(one)["counters"]
    drops = {name: n for name, n in counters.items() if "_drop_" in name}
    assert counters["encap_packets"] == counters["encap_sent"] + sum(drops[it] for it in drops if it[0] == "e")
    ends = counters["decap_delivered"] + counters["decap_punted"] + sum(drops[it] for it in drops if it[0] == "d")
    assert counters["decap_packets"] == ends
    (peer,) = read_status(one)["peers"]
    assert peer["encap_packets"] > 1000
    assert peer["liveness"] == "alive"


def test_what_follows_a_train_of_datagrams_does_not_overtake_it(lab: Lab) -> None:
    """Trains (UDP_SEGMENT) are the workers', and the kernel carried what came next: nine of ten packets came late."""
    one, two = (host.pods[0] for host in lab.hosts)
    wait_until("the pod to answer", lambda: is_answered(one, two.address), LIMIT_S)
    n_rounds, segments, last, length = 50, range(16), 16, 1000
    n_overtaken = 0
    with socket_in(two, socket.SOCK_DGRAM) as receiver, socket_in(one, socket.SOCK_DGRAM) as sender:
        receiver.bind((str(two.address), 5004))
        receiver.settimeout(LIMIT_S)
        sender.connect((str(two.address), 5004))
        for _ in range(n_rounds):
            train = b"".join(it.to_bytes(length) for it in segments)
            sender.sendmsg([train], [(socket.IPPROTO_UDP, _UDP_SEGMENT, length.to_bytes(2, sys.byteorder))])
            sender.send(last.to_bytes(length))
            got = [int.from_bytes(receiver.recv(length)) for _ in range(len(segments) + 1)]
            n_overtaken += got[-1] != last
    # A process may be kept from running between the two for longer than the programs wait.
    assert n_overtaken < n_rounds / 5


def test_large_pings_ttl_and_path_are_as_through_the_workers(lab: Lab) -> None:
    one, two = lab.hosts
    far = two.pods[0]
    ping(one.pods[0], far.address, "-s", "3000")
    ping(one.pods[0], far.address, "-s", "1444", "-M", "do")
    refused = one.pods[0].run(["ping", "-c", "1", "-W", "2", "-s", "1445", "-M", "do", str(far.address)], check=False)
    assert "1472" in refused.stdout + refused.stderr
    assert "ttl=60" in ping(one.pods[0], far.address)
    hops = one.pods[0].run(["traceroute", "-n", "-q", "1", "-w", "2", str(far.address)]).stdout
    assert [str(one.subnet.network_address), str(two.subnet.network_address)] == [
        line.split()[1] for line in hops.splitlines()[2:4]
    ]
    assert ping(one, far.address)


def test_one_host_without_it_is_spoken_to_by_the_workers(lab: Lab) -> None:
    one, two = lab.hosts
    wait_until("an answer to a probe", lambda: read_status(one)["peers"][0]["liveness"] == "alive", LIMIT_S)
    reload(two, "off")
    wait_until("the peer's lease to say so", lambda: not read_status(one)["peers"][0]["shortcut"], LIMIT_S)
    # What was found out about it was forgotten, as of another host.
    assert read_status(one)["peers"][0]["liveness"] == "alive"
    assert state(two) == "off"
    assert is_clean(two)
    with tcp_flow(one.pods[0], two.pods[0]) as to_two, tcp_flow(two.pods[0], one.pods[0], port=5003) as to_one:
        time.sleep(0.3)
    to_two.report.assert_exact()
    to_one.report.assert_exact()
    reload(two, "auto")
    wait_until_on(lab)


def test_switching_it_off_and_on_loses_nothing(lab: Lab) -> None:
    one, two = lab.hosts
    with udp_flow(one.pods[0], two.pods[0], 1000) as flow, tcp_flow(two.pods[0], one.pods[0]) as connection:
        for host in (two, one):
            reload(host, "off")
            wait_until("it to be off", lambda host=host: state(host) == "off", LIMIT_S)  # type: ignore[misc]
            flow.wait_for_more()
            reload(host, "auto")
            wait_until_on(lab)
            flow.wait_for_more()
    assert not flow.report.lost
    connection.report.assert_exact()


def test_killed_workers_are_not_missed(lab: Lab) -> None:
    one, two = lab.hosts
    with udp_flow(one.pods[0], two.pods[0], 1000) as flow:
        kill(two, *datapath_pids(two))
        flow.wait_for_more()
    assert not flow.report.lost
    assert state(two) == "on"


def test_what_a_stopped_daemon_does_not_look_after_goes_to_the_workers_and_comes_back(lab: Lab) -> None:
    """The programs went on, with peers as they once were, for as long as it stood still."""
    one, two = lab.hosts
    assert one.daemon is not None
    with udp_flow(one.pods[0], two.pods[0], 1000) as flow:
        before = by_workers(one)
        one.daemon.send_signal(signal.SIGSTOP)
        try:
            wait_until("the workers to send", lambda: by_workers(one) - before > 100, LIMIT_S)
            flow.wait_for_more()
        finally:
            one.daemon.send_signal(signal.SIGCONT)
        sent = by_kernel(one)["encap_sent"]
        wait_until("the kernel to send", lambda: by_kernel(one)["encap_sent"] > sent + 100, LIMIT_S)
    assert not flow.report.lost
    assert read_status(one)["datapath"]["shortcut_passed"]["encap_lapsed"] > 100
    assert state(one) == "on"


def test_a_killed_daemon_leaves_the_packets_to_the_workers(lab: Lab) -> None:
    one, two = lab.hosts
    with udp_flow(one.pods[0], two.pods[0], 1000) as flow:
        for host in (two, one):
            assert host.daemon is not None
            host.stop_daemon(signal.SIGKILL)
            flow.wait_for_more()
            host.start_daemon()
            host.wait_ready()
            wait_until_on(lab)
    assert not flow.report.lost


_NOTE = (
    "create table if not exists written (value)",
    *(
        f"create trigger note_{it} after {it} on leases begin insert into written values (new.value); end"
        for it in ("insert", "update")
    ),
)
_FORGET = "drop trigger note_insert", "drop trigger note_update", "drop table written"


def in_database(host: Host, *statements: str) -> list[Any]:
    """What the lab's leases answer to the last one."""
    code = (
        "import json, sqlite3, sys; db = sqlite3.connect(sys.argv[1], timeout=15, isolation_level=None);"
        "print(json.dumps([db.execute(it).fetchall() for it in sys.argv[2:]][-1]))"
    )
    answer: list[Any] = json.loads(host.run([sys.executable, "-c", code, str(LEASES), *statements]).stdout)
    return answer


@contextmanager
def written_leases(lab: Lab) -> Iterator[list[dict[str, Any]]]:
    """BackendData of each lease that is written meanwhile; it is there after the block."""
    found: list[dict[str, Any]] = []
    host = lab.hosts[0]
    in_database(host, *_NOTE)
    try:
        yield found
        found += [json.loads(value)["BackendData"] for (value,) in in_database(host, "select value from written")]
    finally:
        in_database(host, *_FORGET)


def test_no_lease_unsays_for_a_moment_that_the_kernel_takes_packets(lab: Lab) -> None:
    """At each restart and each other MTU it did, so all peers changed twice what they do."""
    two = lab.hosts[1]
    with written_leases(lab) as written:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            two.stop_daemon(kind)
            two.start_daemon()
            two.wait_ready()
            wait_until_on(lab)
        for mtu in (1400, 1500):
            two.run(["ip", "link", "set", "eth0", "mtu", str(mtu)])
            wait_until("the device to follow", lambda mtu=mtu: mtu - 28 in mtus(lab), LIMIT_S)  # type: ignore[misc]
        # Filters, on kernels without tcx, and the pair: it is off and on again.
        two.run(["ip", "link", "delete", pair_names("flannel0")[0]])
        wait_until("the pair to be back", lambda: not is_clean(two), LIMIT_S)
        wait_until_on(lab)
    assert len(written) >= 2
    assert all(it["Shortcut"] for it in written)
    with written_leases(lab) as written:
        two.stop_daemon()
        two.start_daemon(["--shortcut=off"])
        two.wait_ready()
        wait_until("the lease to say so", lambda: not read_status(lab.hosts[0])["peers"][0]["shortcut"], LIMIT_S)
        two.stop_daemon()
        two.start_daemon()
        two.wait_ready()
        wait_until_on(lab)
    assert ["Shortcut" in it for it in written][:2] == [False, False]


def test_a_device_that_is_deleted_comes_back_with_it(lab: Lab) -> None:
    one, two = lab.hosts
    for name in ("flannel0", *pair_names("flannel0")[:1]):
        two.run(["ip", "link", "delete", name])
        wait_until("pods to be reached", lambda: is_answered(one.pods[0], two.pods[0].address), LIMIT_S)
        wait_until_on(lab)
    ping(one.pods[0], two.pods[0].address)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
def test_packets_of_several_flows_do_not_wait_for_a_single_processor(lab: Lab) -> None:
    """Whatever the underlay's card had received by its queues, one processor at a time went on with all of it."""
    one, two = lab.hosts
    far = pair_names("flannel0")[1]

    def received() -> list[int]:
        """By each queue of the far end."""
        said = two.run(["ethtool", "-S", far]).stdout
        return [int(it) for it in re.findall(r"rx_queue_\d+_xdp_packets: (\d+)", said)]

    before = received()
    assert len(before) == min(os.cpu_count() or 1, 64)
    with udp_flow(one.pods[0], two.pods[0], 1000, from_many_ports=True) as flow:
        flow.wait_for_more(500)
    assert not flow.report.lost
    assert sum(now - then > 20 for then, now in zip(before, received(), strict=True)) > 1


@pytest.mark.parametrize("change", ["down", "mtu 1000"])
@pytest.mark.parametrize("end", pair_names("flannel0"))
def test_a_pair_that_somebody_changes_is_put_right(lab: Lab, end: str, change: str) -> None:
    """All packets from peers were lost in an end that was down, and the long ones in a far end with a lower MTU."""
    one, two = lab.hosts
    two.run(["ip", "link", "set", end, *change.split()])
    far = two.pods[0].address
    wait_until("long packets to arrive", lambda: is_answered(one.pods[0], far, 1444), LIMIT_S)
    wait_until("the pair to be as it was", lambda: mtus(lab) == {1472}, LIMIT_S)
    wait_until_on(lab)


def test_a_link_of_somebody_else_with_the_name_of_ours_stays(lab: Lab) -> None:
    """It was deleted."""
    two = lab.hosts[1]
    name = pair_names("flannel0")[0]
    reload(two, "off")
    wait_until("it to be off", lambda: state(two) == "off" and is_clean(two), LIMIT_S)
    with ExitStack() as undo:
        two.run(["ip", "link", "add", name, "type", "bridge"])
        undo.callback(two.run, ["ip", "link", "delete", name])
        reload(two, "auto")
        wait_until("it to say so", lambda: state(two).startswith(f"off: cannot make {name}: the name is"), LIMIT_S)
        assert "bridge" in two.run(["ip", "-d", "link", "show", name]).stdout
    wait_until_on(lab)


def test_auto_gives_way_to_rules_that_name_the_port(lab: Lab) -> None:
    two = lab.hosts[1]
    with ExitStack() as undo:
        rule = "table ip t { chain i { type filter hook input priority 0; udp dport 8285 accept; }; }"
        two.run(["nft", "-f", "-"], input=rule)
        undo.callback(two.run, ["nft", "delete", "table", "ip", "t"])
        reload(two, "auto")
        wait_until("it to be off", lambda: state(two).startswith("off: a firewall rule names UDP port 8285"), LIMIT_S)
        reload(two, "require")
        wait_until_on(lab)
    reload(two, "auto")
    wait_until_on(lab)


@pytest.mark.parametrize(
    ("family", "hook"), [("netdev", "ingress"), ("netdev", "egress"), ("inet", "ingress")], ids="-".join
)
def test_auto_gives_way_to_chains_at_the_underlay(lab: Lab, family: str, hook: str) -> None:
    """One that dropped all of a peer's packets was passed by, and nothing said so."""
    host = lab.hosts[1]
    with ExitStack() as undo:
        chain = f"chain c {{ type filter hook {hook} device eth0 priority 0; ip saddr 192.0.2.1 drop; }}"
        host.run(["nft", "-f", "-"], input=f"table {family} t {{ {chain}; }}")
        undo.callback(host.run, ["nft", "delete", "table", family, "t"])
        reload(host, "auto")
        said = "off: the chain c of nft (table t) stands at eth0"
        wait_until("it to be off", lambda: state(host).startswith(said), LIMIT_S)
    # Another link's.
    with ExitStack() as undo:
        host.run(["nft", "-f", "-"], input=f"table netdev t {{ {chain.replace('eth0', 'cni0')}; }}")
        undo.callback(host.run, ["nft", "delete", "table", "netdev", "t"])
        reload(host, "auto")
        wait_until_on(lab)


def test_auto_lets_nothing_in_that_the_firewall_drops(lab: Lab) -> None:
    """A policy of drop names no port: the workers got nothing, and the shortcut all."""
    two = lab.hosts[1]
    rules = "table ip t { chain i { type filter hook input priority 0; policy drop; iif lo accept; }; }"
    with ExitStack() as undo:
        two.run(["nft", "-f", "-"], input=rules)
        undo.callback(two.run, ["nft", "delete", "table", "ip", "t"])
        reload(two, "auto")
        wait_until("it to be off", lambda: state(two).startswith("off: ") and "drops" in state(two), LIMIT_S)
    reload(two, "auto")


def test_auto_sends_nothing_in_clear_text_that_ipsec_means_to_encrypt(lab: Lab) -> None:
    """Out and in, policies were passed by and nothing said so."""
    one, two = (str(read_status(it)["underlay"]["address"]) for it in lab.hosts)
    host = lab.hosts[1]
    # `level use`: the workers' datagrams pass, as there is nothing to encrypt them with.
    policy = ["src", f"{two}/32", "dst", f"{one}/32", "proto", "udp", "dport", "8285", "dir", "out"]
    with ExitStack() as undo:
        tmpl = ["tmpl", "proto", "esp", "mode", "transport", "level", "use"]
        host.run(["ip", "xfrm", "policy", "add", *policy, *tmpl])
        undo.callback(host.run, ["ip", "xfrm", "policy", "delete", *policy])
        reload(host, "auto")
        wait_until("it to be off", lambda: state(host).startswith(f"off: the IPsec policy `src {two}/32"), LIMIT_S)
    reload(host, "auto")
    wait_until_on(lab)


def test_what_a_device_that_is_down_drops_is_counted_as_dropped(lab: Lab) -> None:
    """It counted as delivered."""
    one, two = lab.hosts
    before = read_status(two)["counters"]["decap_drop_tun"]
    assert two.daemon is not None
    with udp_flow(one.pods[0], two.pods[0], 1000):
        # Its daemon would have it up again at once.
        two.daemon.send_signal(signal.SIGSTOP)
        try:
            two.run(["ip", "link", "set", "flannel0", "down"])
            time.sleep(0.3)
        finally:
            two.daemon.send_signal(signal.SIGCONT)
        wait_until("the drops", lambda: read_status(two)["counters"]["decap_drop_tun"] - before > 50, LIMIT_S)
    wait_until("pods to be reached", lambda: is_answered(one.pods[0], two.pods[0].address), LIMIT_S)
    wait_until_on(lab)


def test_an_underlay_that_takes_less_loses_nothing(lab: Lab) -> None:
    one, two = lab.hosts
    with udp_flow(one.pods[0], two.pods[0], 1000) as flow:
        for mtu in (1400, 1500):
            for host in lab.hosts:
                host.run(["ip", "link", "set", "eth0", "mtu", str(mtu)])
            flow.wait_for_more()
            wait_until("the devices to follow", lambda mtu=mtu: mtus(lab) == {mtu - 28}, LIMIT_S)  # type: ignore[misc]
            wait_until_on(lab)
            ping(one.pods[0], two.pods[0].address, "-s", "1400", "-M", "dont")
    assert not flow.report.lost


def test_cleanup_leaves_nothing(lab: Lab) -> None:
    one = lab.hosts[0]
    one.stop_daemon(signal.SIGKILL)
    assert not is_clean(one)
    one.run(CLEANUP)
    assert is_clean(one)
    assert not has_clsact(one)
    one.start_daemon()
    one.wait_ready()
    wait_until_on(lab)
    one.stop_daemon()
    one.run(CLEANUP)
    assert is_clean(one)
    assert not has_clsact(one)
    one.start_daemon()
    one.wait_ready()
    wait_until_on(lab)


def test_without_the_right_to_load_programs_auto_is_off_and_require_does_not_start(lab: Lab) -> None:
    one, two = lab.hosts
    no_right = ["setpriv", "--bounding-set=-bpf,-sys_admin", "--inh-caps=-bpf,-sys_admin", *lab.daemon_command]
    one.stop_daemon()
    one.start_daemon(command=no_right)
    one.wait_ready()
    wait_until("it to say why", lambda: "CAP_BPF" in state(one), LIMIT_S)
    # The daemon before has said in the lease that it has it.
    wait_until("its lease to say so", lambda: not read_status(two)["peers"][0]["shortcut"], LIMIT_S)
    assert state(one).startswith("off: ")
    assert not [line for line in read_status(one)["problems"] if "shortcut" in line]
    ping(one.pods[0], two.pods[0].address)
    one.stop_daemon()
    one.start_daemon(["--shortcut=require"], no_right)
    assert one.daemon is not None
    assert one.daemon.wait(LIMIT_S) == 2
    (line,) = [it for it in one.daemon_log().splitlines() if "Shortcut: it is required" in it]
    assert "CAP_BPF" in line


def test_what_outlives_a_killed_daemon_lapses_and_loses_nothing(
    filter_lab: Lab, request: pytest.FixtureRequest, figure: Callable[..., None]
) -> None:
    """Filters stay, and would send to a host for as long as this one runs, whoever has its subnet by then."""
    one, two = filter_lab.hosts
    with udp_flow(one.pods[0], two.pods[0], 1000) as flow, tcp_flow(two.pods[0], one.pods[0]) as connection:
        for host in (one, two) if request.config.getoption("--full") else (one,):
            assert filters(host) > PROGRAMS
            before, began_s = by_workers(host), time.monotonic()
            host.stop_daemon(signal.SIGKILL)
            wait_until("the workers to send", lambda: by_workers(host) - before > 100, LIMIT_S)  # noqa: B023
            figure("the workers send again after a kill", time.monotonic() - began_s, "s")
            flow.wait_for_more()
            assert filters(host) > PROGRAMS
            host.start_daemon()
            host.wait_ready()
            wait_until_on(filter_lab)
            flow.wait_for_more()
    assert not flow.report.lost
    connection.report.assert_exact()


def test_a_daemon_without_it_removes_what_a_killed_one_has_left(filter_lab: Lab) -> None:
    one, two = filter_lab.hosts
    with udp_flow(one.pods[0], two.pods[0], 1000) as flow:
        one.stop_daemon(signal.SIGKILL)
        one.start_daemon(["--shortcut=off"])
        one.wait_ready()
        wait_until("it to be gone", lambda: is_clean(one), LIMIT_S)
        flow.wait_for_more()
        one.stop_daemon()
        one.start_daemon()
        one.wait_ready()
        wait_until_on(filter_lab)
    assert not flow.report.lost


def test_filters_that_somebody_takes_out_come_back(filter_lab: Lab) -> None:
    one, two = filter_lab.hosts
    with udp_flow(one.pods[0], two.pods[0], 1000) as flow:
        two.run(["tc", "filter", "delete", "dev", "eth0", "ingress"])
        wait_until("them to be back", lambda: f"udptun {NETWORK} decap" in filters(two), LIMIT_S)
        wait_until_on(filter_lab)
    assert not flow.report.lost


def test_the_filters_of_others_stay_when_ours_go(filter_lab: Lab) -> None:
    """Switched off, stopped, and by cleanup after a kill."""
    one = filter_lab.hosts[0]
    theirs = ["dev", "eth0", "ingress", "prio", "1"]
    one.run(["tc", "filter", "add", *theirs, "protocol", "all", "bpf", "da", "bytecode", "1,6 0 0 4294967295,"])

    def leaves(end: Callable[[], object]) -> None:
        end()
        wait_until("ours to be gone", lambda: not filters(one) & PROGRAMS, LIMIT_S)
        assert "bytecode" in one.run(["tc", "filter", "show", *theirs[:3]]).stdout

    try:
        leaves(lambda: reload(one, "off"))
        reload(one, "auto")
        wait_until_on(filter_lab)
        leaves(one.stop_daemon)
        one.start_daemon()
        one.wait_ready()
        wait_until_on(filter_lab)
        one.stop_daemon(signal.SIGKILL)
        assert filters(one) > PROGRAMS
        leaves(lambda: one.run(CLEANUP))
        assert filters(one) == set()
        assert has_clsact(one)
    finally:
        one.run(["tc", "qdisc", "delete", "dev", "eth0", "clsact"])

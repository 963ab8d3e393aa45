"""Hosts that join, leave and move, and thousands of leases at once, while two other hosts' pods go on talking."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator

import pytest
from bad_data import GOOD, LEASES
from traffic import (
    CLEANUP,
    REAL_TIME,
    n_fds,
    peers,
    ping,
    read_status,
    rss_mib,
    seconds_until,
    tunnel_address,
    udp_flow,
)

from udptun.lab.host import SUBNET_ENV, UNDERLAY, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES as DATABASE
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

FOLLOWS_S = 5.0
"""Five times the second in which the tables must follow: the machine may be busy."""

WIDE = {"Network": "10.0.0.0/8", "Backend": {"Type": "udp"}}

EXECUTE = """
import json, sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)
statement, rows = json.load(sys.stdin)
db.execute("begin immediate")
db.executemany(statement, rows)
db.execute("commit")
print(time.monotonic())
"""

ADD = "insert into leases (key, value, expires) values (?, ?, ?)"
DELETE = "delete from leases where key = ?"


def execute(host: Host, statement: str, rows: Iterable[tuple[object, ...]]) -> float:
    """Run the statement for every row, all in one transaction on the shared store; when it was done (monotonic s)."""
    command = [sys.executable, "-I", "-S", "-c", EXECUTE, str(DATABASE)]
    return float(host.run(command, input=json.dumps([statement, list(rows)])).stdout)


def lease(number: int, expires_s: float) -> tuple[str, str, float]:
    """A stranger's row: subnet 10.<64 + high>.<low>.0/24, address 172.<16 + high>.<low>.1."""
    high, low = divmod(number, 256)
    value = {
        "PublicIP": f"172.{16 + high}.{low}.1",
        "PublicIPv6": None,
        "BackendType": "udp",
        "BackendData": {"Port": 8285, "NodeID": f"{number:032x}", "Udptun": 1},
    }
    return f"10.{64 + high}.{low}.0-24", json.dumps(value), expires_s


def in_an_hour() -> float:
    return time.time() + 3600


def add_host(lab: Lab) -> Host:
    host = lab.add_host()
    host.start_daemon()
    host.wait_ready()
    host.add_pod()
    return host


@pytest.fixture(scope="module")
def wide_lab() -> Iterator[Lab]:
    """Two hosts with a pod each in a Network wide enough for 10,000 leases."""
    with Lab("t-members", net_conf=WIDE) as lab:
        lab.daemon_command[:0] = REAL_TIME
        lab.start()
        yield lab


@pytest.fixture
def lab(wide_lab: Lab) -> Iterator[Lab]:
    """The lab, with 200 packets/s from h1's pod to h2's during the test, none of which may be lost."""
    one, two = wide_lab.hosts[:2]
    with udp_flow(one.pod(1), two.pod(1), 200) as flow:
        yield wide_lab
        flow.wait_for_more(20)
    assert flow.report.lost == []
    assert flow.report.n_duplicates == flow.report.n_spoilt == 0
    for host in wide_lab.hosts[:2]:
        assert "Traceback" not in host.daemon_log()


def the_others(lab: Lab) -> list[Host]:
    return lab.hosts[:2]


def until_all(lab: Lab, what: str, holds: Callable[[dict[str, str]], bool]) -> float:
    """How long it takes until `holds` of the tables of the first two hosts."""
    return seconds_until(lambda: all(holds(peers(host)) for host in the_others(lab)), what, FOLLOWS_S)


def test_others_reach_a_host_that_joins(lab: Lab) -> None:
    new = add_host(lab)
    subnet, address = str(new.subnet), str(new.underlay_address)
    seconds = until_all(lab, f"{subnet} in the tables", lambda table: table.get(subnet) == address)
    print(f"in the others' tables {seconds * 1000:.0f} ms after the new host is ready")
    for host in the_others(lab):
        ping(host.pod(1), new.pod(1).address)
        ping(new.pod(1), host.pod(1).address)
    new.down()


def test_others_forget_a_host_that_releases_its_lease(lab: Lab) -> None:
    new = add_host(lab)
    subnet = str(new.subnet)
    until_all(lab, f"{subnet} in the tables", lambda table: subnet in table)
    assert new.stop_daemon() == 0
    assert all(subnet in peers(host) for host in the_others(lab))
    new.run([*CLEANUP, "--release"])
    seconds = until_all(lab, f"{subnet} to go", lambda table: subnet not in table)
    print(f"gone from the others' tables {seconds * 1000:.0f} ms after the release")
    unreachable = lab.host(1).pod(1).run(["ping", "-c", "1", "-W", "5", str(new.pod(1).address)], check=False)
    assert "Destination Net Unreachable" in unreachable.stdout
    new.down()


def test_others_forget_a_host_whose_lease_expires(lab: Lab) -> None:
    key, value, _ = lease(1, 0)
    expires_s = time.time() + 1.5
    execute(lab.host(1), ADD, [(key, value, expires_s)])
    subnet = key.replace("-", "/")
    until_all(lab, f"{subnet} in the tables", lambda table: subnet in table)
    wait_until(f"{subnet} to expire", lambda: time.time() >= expires_s, 5)
    seconds = until_all(lab, f"{subnet} to go", lambda table: subnet not in table)
    print(f"gone from the others' tables {seconds * 1000:.0f} ms after its expiry")


def test_others_follow_a_host_to_its_new_public_ip(lab: Lab) -> None:
    """The address changes while its daemon is stopped; the datapath that has run on is moved to the new one."""
    new = add_host(lab)
    subnet, datapath = str(new.subnet), read_status(new)["datapath"]["pid"]
    ping(lab.host(1).pod(1), new.pod(1).address)
    assert new.stop_daemon() == 0
    new.move(UNDERLAY[200])
    new.start_daemon()
    new.wait_ready()
    seconds = until_all(lab, "the new address", lambda table: table.get(subnet) == str(UNDERLAY[200]))
    print(f"in the others' tables {seconds * 1000:.0f} ms after the moved host is ready again")
    assert str(new.subnet) == subnet
    for host in the_others(lab):
        ping(host.pod(1), new.pod(1).address)
        ping(new.pod(1), tunnel_address(host))
    print(f"datapath of the moved host: {datapath} -> {read_status(new)['datapath']['pid']}")
    new.down()


def test_every_bad_lease_is_one_line_and_harms_nobody(two_hosts: Lab) -> None:
    """All of them at once, as a script gone wrong writes them, while packets flow; then a start that finds them."""
    host, other = two_hosts.hosts
    subnet = host.subnet
    bad = [(key, value, reason) for key, value, reason in LEASES if key != "config"]
    bad += [
        (f"{other.subnet.network_address}-25", GOOD, f"overlaps the lease {other.subnet.network_address}-24"),
        (f"{host.subnet.network_address}-25", GOOD, "overlaps our own lease"),
        ("10.244.140.0-24", GOOD.replace("192.0.2.200", str(host.underlay_address)), "is our own"),
    ]
    rows: dict[str, tuple[str, float]] = {}
    reasons: dict[str, str] = {}
    for key, value, reason in bad:
        rows.setdefault(key, (value, in_an_hour()))
        reasons.setdefault(key, reason)

    def check(rows: Collection[str]) -> None:
        until_all(two_hosts, "the good lease", lambda table: "10.244.250.0/24" in table)
        skipped = read_status(host)["skipped"]
        assert len(skipped) == len(rows), skipped
        for key in rows:
            assert any(
                line.startswith((f"{key}: ", f"lease {key!r}: ")) and reasons[key] in line for line in skipped
            ), key
        assert read_status(host)["problems"] == []
        assert len(peers(host)) == 2

    daemons = [each.daemon for each in two_hosts.hosts]
    with udp_flow(host.pod(1), other.pod(1), 200) as flow:
        added = [(key, *row) for key, row in [*rows.items(), ("10.244.250.0-24", (GOOD, in_an_hour()))]]
        execute(host, ADD, added)
        check(rows)
        named = [line for line in host.daemon_log().splitlines() if "lease skipped" in line]
        print("\n".join(line[:150] for line in named))
        assert len(named) == len(rows)
        assert max(map(len, named)) < 400
        assert all(each is not None and each.poll() is None for each in daemons)
        assert host.stop_daemon() == 0
        host.start_daemon()
        host.wait_ready()
        assert host.subnet == subnet, "it took the other lease with its PublicIP"
        # Which it deletes, as flannel does: it has one lease.
        check(rows.keys() - {"10.244.140.0-24"})
        execute(host, DELETE, [(key,) for key in rows])
        seconds_until(lambda: read_status(host)["skipped"] == [], "nothing to be skipped any more", FOLLOWS_S)
        flow.wait_for_more(20)
    assert flow.report.lost == []
    for each in two_hosts.hosts:
        assert "Traceback" not in each.daemon_log()


def test_ten_thousand_leases_are_followed_and_cost_little(lab: Lab, figure: Callable[..., None]) -> None:
    n = 10_000
    host = lab.host(1)
    daemon = read_status(host)["pid"]
    before, n_peers = rss_mib(host, daemon), len(peers(host))
    longest_ms = 0.0

    def status_when(holds: Callable[[int], bool]) -> float:
        """When the first status came whose number of peers `holds` (monotonic s)."""
        nonlocal longest_ms
        deadline = time.monotonic() + FOLLOWS_S
        while True:
            asked = time.monotonic()
            found = holds(len(peers(host)))
            longest_ms = max(longest_ms, (time.monotonic() - asked) * 1000)
            if found:
                return time.monotonic()
            assert asked < deadline, f"not so after {FOLLOWS_S} s"

    with contextlib.ExitStack() as undo:
        committed = execute(host, ADD, [lease(i, in_an_hour()) for i in range(n)])
        undo.callback(execute, host, DELETE, [(lease(i, 0)[0],) for i in range(n)])
        shown = status_when(lambda count: count == n_peers + n)
        grown = rss_mib(host, daemon)
        figure(f"{n} leases in `status` after the transaction", shown - committed, "s")
        figure(f"more memory of the daemon for {n} leases", grown - before, "MiB")
        print(f"slowest status {longest_ms:.0f} ms")
        assert read_status(host)["skipped"] == []
        assert grown - before < 100
        ping(host.pod(1), tunnel_address(lab.host(2)))

        start = time.monotonic()
        assert host.stop_daemon() == 0
        host.start_daemon()
        host.wait_ready()
        figure(f"daemon stopped and ready again with {n} leases", time.monotonic() - start, "s")
        assert len(peers(host)) == n_peers + n
    start = time.monotonic()
    status_when(lambda count: count == n_peers)
    print(f"and gone again from `status` after {time.monotonic() - start:.2f} s")
    ping(host.pod(1), tunnel_address(lab.host(2)))


@pytest.mark.parametrize("n_joins", [100, pytest.param(10_000, marks=[pytest.mark.full, pytest.mark.timeout(1200)])])
def test_memory_and_descriptors_stay_flat_over_joins_and_leaves(
    lab: Lab, figure: Callable[..., None], n_joins: int
) -> None:
    host = lab.host(1)
    facts = read_status(host)
    daemon, datapath = facts["pid"], facts["datapath"]["pid"]
    at_once = 10

    def cycle(round_number: int) -> None:
        rows = [lease(round_number * at_once + i, in_an_hour()) for i in range(at_once)]
        subnets = {row[0].replace("-", "/") for row in rows}
        execute(lab.host(2), ADD, rows)
        until_all(lab, "the leases to come", lambda table: subnets <= table.keys())
        execute(lab.host(2), DELETE, [(row[0],) for row in rows])
        until_all(lab, "the leases to go", lambda table: not subnets & table.keys())

    def measure() -> dict[str, float]:
        return {
            "daemon MiB": round(rss_mib(host, daemon), 2),
            "datapath MiB": round(rss_mib(host, datapath), 2),
            "daemon descriptors": n_fds(host, daemon),
            "datapath descriptors": n_fds(host, datapath),
        }

    for i in range(3):  # whatever is allocated once
        cycle(i)
    before = measure()
    for i in range(n_joins // at_once):
        cycle(i)
    after = measure()
    for what in before:
        figure(f"{n_joins} joins and leaves, more {what}", round(after[what] - before[what], 2))
    assert after["daemon MiB"] - before["daemon MiB"] < 2
    assert after["datapath MiB"] - before["datapath MiB"] < 0.5
    assert after["daemon descriptors"] == before["daemon descriptors"]
    assert after["datapath descriptors"] == before["datapath descriptors"]
    assert read_status(host)["datapath"]["pid"] == datapath


# --- a lease that flanneld wrote under an address of before


def test_subnet_of_flanneld_is_kept_when_the_hosts_address_has_changed_and_never_taken_from_another_host() -> None:
    """The host got another subnet, and its pods, which have addresses of the one in subnet.env, were cut off."""
    nobody, somebody = UNDERLAY[200], UNDERLAY[1]
    kept, others = "10.64.7.0", "10.64.8.0"
    with Lab("t-former", net_conf=WIDE) as lab:
        rows = [
            (f"{subnet}-24", json.dumps({"PublicIP": str(ip), "PublicIPv6": None}), in_an_hour())
            for subnet, ip in ((kept, nobody), (others, somebody))
        ]
        lab.host(1).start_daemon()
        lab.host(1).wait_ready()
        assert lab.host(1).stop_daemon() == 0
        lab.host(1).run([*CLEANUP, "--release"])
        execute(lab.host(1), ADD, rows)
        for host, subnet in zip(lab.hosts[:2], (kept, others), strict=True):
            host.path(SUBNET_ENV).parent.mkdir(parents=True, exist_ok=True)
            host.path(SUBNET_ENV).write_text(f"FLANNEL_SUBNET={subnet.removesuffix('0')}1/24\n")
            # The kernel gives up after 0.3 s instead of 3 s, and asks a neighbour that it knows without 5 s of delay.
            settings = ("retrans_time_ms=100", "delay_first_probe_time=0")
            host.run(["sysctl", "-qw", *(f"net.ipv4.neigh.eth0.{setting}" for setting in settings)])
            host.start_daemon()
        for host in lab.hosts[:2]:
            host.wait_ready(20)
        assert str(lab.host(1).subnet) == f"{kept}/24"
        assert str(lab.host(2).subnet) != f"{others}/24"
        assert f"which subnet.env names, is left to {somebody}" in lab.host(2).daemon_log()
        seen = peers(lab.host(2))
        assert seen[f"{kept}/24"] == str(lab.host(1).underlay_address)
        assert seen[f"{others}/24"] == str(somebody)

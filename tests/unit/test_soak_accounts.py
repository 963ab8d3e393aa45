"""The soak's schedule, its receivers' accounts and its checks: each must see what is wrong, and nothing else."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from bench.soak import checks, report
from bench.soak.checks import SECOND_NS, Window
from bench.soak.faults import FAULTS, SLACK, faults_of
from bench.soak.load import Gap, Seen
from bench.soak.run import Options
from bench.soak.schedule import PAUSE_S, Kind, Step, schedule
from bench.soak.state import Footprint, comparable
from bench.soak.traffic_end import LOST_AFTER_NS, Arrivals, datagram

KINDS = [Kind("a", (0, 1)), Kind("b", (2, 3), ends_processes=True), Kind("c", (0.5, 0.5))]


def steps(seed: int, n: int, kinds: list[Kind] = KINDS) -> list[Step]:
    return list(itertools.islice(schedule(seed, kinds, 3), n))


# --- schedule


def test_a_seed_says_everything_and_another_one_says_something_else() -> None:
    assert steps(7, 200) == steps(7, 200)
    assert steps(7, 200) != steps(8, 200)


def test_every_kind_has_its_turn_as_often_as_any_other() -> None:
    for n in (3, 50, 200):
        counts = Counter(step.fault for step in steps(1, n))
        assert max(counts.values()) - min(counts[kind.name] for kind in KINDS) <= 1


def test_steps_are_numbered_and_within_their_bounds() -> None:
    holds = {kind.name: kind.hold_s for kind in KINDS}
    for number, step in enumerate(steps(3, 300), 1):
        assert step.number == number
        assert PAUSE_S[0] <= step.pause_s <= PAUSE_S[1]
        assert holds[step.fault][0] <= step.hold_s <= holds[step.fault][1]
        assert step.host in (1, 2, 3)


def test_the_processes_of_the_last_host_are_never_ended() -> None:
    hosts = {(step.fault, step.host) for step in steps(5, 300)}
    assert hosts == {("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("c", 1), ("c", 2), ("c", 3)}


def test_the_table_of_faults_has_its_names_and_a_sense_of_time() -> None:
    assert all(fault.name == name for name, fault in FAULTS.items())
    assert all(0 <= fault.hold_s[0] <= fault.hold_s[1] for fault in FAULTS.values())
    assert {fault.name for fault in faults_of("A")} == FAULTS.keys() - {"path narrow"}
    # What the documentation promises to cost no packet.
    for name in (
        "daemon killed",
        "active datapath process killed",
        "daemon stopped",
        "daemon taken over",
        "store away",
    ):
        assert FAULTS[name].after_s is None


def test_the_command_that_repeats_a_step_names_all_that_it_depends_on() -> None:
    command = Options(3, 30, "vtep", "etcd", "C", ("store away",), packets_per_s=100, mbit_per_s=5).command(12)
    assert command == (
        "python -m bench soak --seed 3 --minutes 30 --backend vtep --store etcd --mode C --packets 100 --mbit 5 "
        "--faults 'store away' --first 12 --steps 1"
    )


# --- what a receiver sees


def arrive(arrivals: Arrivals, *numbers: int, at_ns: int = 0) -> None:
    for number in numbers:
        arrivals.take(datagram(number, number * 1000), at_ns or number * 1000)


def test_lost_doubled_and_overtaken_packets_are_told_apart() -> None:
    arrivals = Arrivals()
    arrive(arrivals, 0, 1, 3, 2, 3, 7, 8)
    seen = arrivals.report(8000 + LOST_AFTER_NS)
    assert seen["lost"] == [[3, 3000, 7000]]
    assert (seen["received"], seen["doubled"], seen["overtaken"], seen["spoilt"]) == (7, 1, 1, 0)
    seen = arrivals.report(9000 + LOST_AFTER_NS)
    assert (seen["lost"], seen["received"], seen["doubled"]) == ([], 7, 0)


def test_a_packet_that_may_still_come_is_not_lost_yet() -> None:
    arrivals = Arrivals()
    arrive(arrivals, 0, 2, at_ns=SECOND_NS)
    assert arrivals.report(SECOND_NS + LOST_AFTER_NS)["lost"] == []
    assert arrivals.report(SECOND_NS + LOST_AFTER_NS + 1)["lost"] == [[1, 0, 2000]]


def test_a_changed_byte_is_seen() -> None:
    arrivals = Arrivals()
    arrivals.take(datagram(0, 5)[:-1] + b"?", 5)
    assert (arrivals.report(6)["spoilt"], arrivals.received) == (1, 0)


# --- loss and windows


def window(after_s: float | None, may_double: int = 0) -> Window:
    """Of a fault on h1 that came at 10 s and had gone at 12 s."""
    return Window(10 * SECOND_NS, 12 * SECOND_NS, after_s, frozenset(["h1"]), may_double)


def gap(after_s: float, before_s: float, n: int = 5) -> Gap:
    return Gap(n, int(after_s * SECOND_NS), int(before_s * SECOND_NS))


def wrong(found: Seen, of: Window, hosts: tuple[str, str] = ("h1", "h2"), name: str = "udp h1 -> h2") -> list[str]:
    return checks.flow_problems(name, hosts, [found], of, [])


def seen(*lost: Gap, **more: int) -> Seen:
    return Seen(1000, **{"spoilt": 0, "longest_silence_ns": 0, **more}, lost=list(lost))


def test_a_fault_that_may_cost_nothing_fails_on_a_single_packet() -> None:
    assert wrong(seen(), window(None)) == []
    (line,) = wrong(seen(gap(11, 11.004, 1)), window(None))
    assert line == "udp h1 -> h2 lost 1 packets, sent 1.000 to 1.004 s after the fault came"


@pytest.mark.parametrize(("lost", "is_allowed"), [((10, 12), True), ((9.5, 14.9), True), ((11, 15.1), False)])
def test_a_fault_with_a_window_may_lose_within_it_alone(lost: tuple[float, float], is_allowed: bool) -> None:
    assert (wrong(seen(gap(*lost)), window(3.0)) == []) is is_allowed
    # A gap that began long before the fault has another cause.
    assert wrong(seen(gap(5, 12)), window(3.0)) != []


def test_flows_between_other_hosts_may_lose_nothing_meanwhile() -> None:
    assert wrong(seen(gap(10, 11)), window(3.0), ("h2", "h3"), "udp h2 -> h3") != []


def test_what_the_machine_has_lost_for_want_of_a_processor_is_not_ours() -> None:
    lost = seen(gap(11, 11.5))
    long, short = (11 * SECOND_NS, int(11.3 * SECOND_NS)), (11 * SECOND_NS, int(11.06 * SECOND_NS))
    for starved, n in ((long, 0), (short, 1), ((3 * SECOND_NS, 4 * SECOND_NS), 1)):
        assert len(checks.flow_problems("udp", ("h1", "h2"), [lost], window(None), [starved])) == n


def test_doubled_and_spoilt_packets_and_a_silent_stream_are_wrong() -> None:
    assert wrong(seen(doubled=128), window(None, 128)) == []
    assert wrong(seen(doubled=129), window(None, 128)) == ["udp h1 -> h2: 129 packets came twice"]
    assert wrong(seen(spoilt=1), window(3.0)) == ["udp h1 -> h2: 1 spoilt"]
    silent = seen(longest_silence_ns=6 * SECOND_NS)
    assert wrong(silent, window(None), name="tcp h1 -> h2") == ["tcp h1 -> h2 was silent for 6.0 s"]
    assert wrong(silent, window(3.0), name="tcp h1 -> h2") == []


# --- status, table, counters

LEASES = {f"10.244.{n}.0-24": json.dumps({"PublicIP": f"192.168.77.1{n}"}) for n in (1, 2, 3)}


def facts(**changes: Any) -> dict[str, Any]:
    peers = [{"subnet": f"10.244.{n}.0/24", "public_ip": f"192.168.77.1{n}", "liveness": "alive"} for n in (2, 3)]
    return {
        "problems": [],
        "lease": {"subnet": "10.244.1.0/24", "public_ip": "192.168.77.11"},
        "peers": peers,
        "datapath": {"pid": 4, "standby_pids": [7], "workers": ["running"]},
        "skipped": [],
        "other_types": [],
        **changes,
    }


def host_problems(document: dict[str, Any], leases: dict[str, str] = LEASES, narrow: Collection[str] = ()) -> list[str]:
    return checks.host_problems(document, leases, "192.168.77.11", "10.244.1.0/24", 1, narrow)


def test_a_host_that_is_well_has_no_problem() -> None:
    assert host_problems(facts()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"problems": ["x"]}, "problem: x"),
        ({"lease": None}, "its lease is None at None, not 10.244.1.0/24 at 192.168.77.11"),
        ({"peers": facts()["peers"][:1]}, "peer 10.244.3.0/24 is None in the table, 192.168.77.13 in the store"),
        ({"skipped": ["k"]}, "skipped lease k"),
        ({"datapath": {"pid": 4, "standby_pids": [], "workers": ["running"]}}, "datapath process 4, standbys []"),
        (
            {"datapath": {"pid": 4, "standby_pids": [7], "workers": ["tun_lost"]}},
            "workers ['tun_lost'], not 1 running ones",
        ),
    ],
)
def test_each_thing_that_is_wrong_with_a_host_is_named(changes: dict[str, Any], says: str) -> None:
    assert host_problems(facts(**changes)) == [says]


def test_a_table_is_compared_with_the_store_both_ways() -> None:
    moved = {**LEASES, "10.244.2.0-24": json.dumps({"PublicIP": "192.168.77.99"})}
    del moved["10.244.3.0-24"]
    assert host_problems(facts(), moved) == [
        "peer 10.244.2.0/24 is 192.168.77.12 in the table, 192.168.77.99 in the store",
        "peer 10.244.3.0/24 is 192.168.77.13 in the table, None in the store",
    ]
    del moved["10.244.1.0-24"]
    assert "the store has no lease of 10.244.1.0/24" in host_problems(facts(), moved)


def test_a_path_that_was_narrow_may_be_taken_for_one_for_a_while() -> None:
    line = f"the path to the host of 10.244.2.0/24 at 1.2.3.4 takes packets of 1272 bytes, 200 {checks.NARROW_LINE}0"
    route = "type unicast dst 10.244.2.0/24 dev flannel0 protocol 158 metrics [{'mtu': 1272}]"
    before, now = {"routes": ["a"]}, {"routes": ["a", route]}
    for narrow, n in ((["10.244.2.0/24"], 0), (["10.244.3.0/24"], 1), ([], 1)):
        assert len(host_problems(facts(problems=[line]), narrow=narrow)) == n
        assert len(checks.state_problems(before, now, narrow)) == n


def test_counters_add_up_or_are_named_with_their_ends() -> None:
    counters = {
        "encap_packets": 5,
        "encap_sent": 3,
        "encap_drop_ttl": 2,
        "decap_packets": 0,
        "decap_delivered": 0,
        "inject_packets": 1,
        "inject_sent": 1,
        "inject_drop_full": 9,
        "drop_stranger": 4,
    }
    assert checks.sum_problems(counters) == []
    assert checks.sum_problems({**counters, "encap_sent": 4}) == [
        "encap_packets is 5, and its ends add up to 6 (encap_sent 4, encap_drop_ttl 2)"
    ]
    assert checks.backward_problems({"a": 3, "b": 2}, {"a": 3, "b": 1}) == ["b went back from 2 to 1"]


def test_what_is_gone_and_what_is_left_over_is_named_line_by_line() -> None:
    before, now = {"routes": ["a", "b", "b"]}, {"routes": ["b", "c"]}
    assert checks.state_problems(before, before, []) == []
    assert checks.state_problems(before, now, []) == [
        "routes: gone: a",
        "routes: gone: b",
        "routes: left over: c",
    ]


def test_states_are_compared_without_what_is_chance() -> None:
    names = {"192.168.77.12": "h2"}
    assert comparable(":FORWARD ACCEPT [12:345]", names) == ":FORWARD ACCEPT "
    assert comparable("# Generated by iptables-save v1.8.9 on Sun Nov 29", names) == ""
    assert comparable("datapath-8d5f8219.sock", names) == "datapath-*.sock"
    assert comparable("gateway 192.168.77.12 dev eth0", names) == "gateway h2 dev eth0"
    assert comparable("gateway 192.168.77.120 dev eth0", names) == "gateway 192.168.77.120 dev eth0"


# --- growth


def samples(mib_per_minute: float, fds: int = 0, n: int = 40) -> list[Footprint]:
    """Of one daemon, every minute.  What it allocates at the beginning is no growth."""
    return [
        Footprint("h3", "daemon", 2, 60.0 * i, 20 + min(i, 8) + mib_per_minute * i + 0.05 * (i % 2), 30 + fds * i)
        for i in range(n)
    ]


def test_growth_is_told_from_warming_up_and_noise() -> None:
    (flat,) = checks.growths(samples(0))
    assert abs(flat.grown_mib) < 0.1
    assert checks.growth_problems(flat) == []
    (grown,) = checks.growths(samples(0.2))
    assert 2.4 < grown.grown_mib < 2.8
    (line,) = checks.growth_problems(grown)
    assert line == f"h3: daemon (pid 2) after 39.0 minutes is still growing, by {grown.grown_mib:.2f} MiB"
    (leaking,) = checks.growths(samples(0, fds=1))
    assert "descriptors" in checks.growth_problems(leaking)[0]


def test_a_process_that_lived_for_a_few_looks_says_nothing() -> None:
    assert checks.growths(samples(5, n=checks.MIN_SAMPLES - 1)) == []
    assert checks.growths([replace(it, at_s=it.at_s / 5) for it in samples(5)]) == []


# --- report


def test_the_report_has_a_row_for_each_fault_and_every_line_that_is_wrong() -> None:
    step = {
        "number": 1,
        "fault": "daemon killed",
        "host": "h1",
        "at_s": 3.0,
        "lost": 0,
        "starved": 0,
        "leaked": 0,
        "outage_s": 0.0,
        "after_s": 0.0,
        "settled_s": 0.4,
        "silence_s": 0.1,
        "problems": [],
    }
    bad = {**step, "number": 2, "lost": 7, "outage_s": 0.25, "problems": ["udp lost 7 packets"]}
    machine = dict.fromkeys(("commit", "uncommitted_changes", "kernel", "cpu", "cores", "python"), "x")
    document = {
        "command": "python -m bench soak",
        "started": "2024",
        "machine": machine,
        "runs": [step, bad],
        "minutes": 0.1,
        "growths": [],
        "growth_problems": ["h3 grew"],
        "footprints": [],
        "flows": {"udp": 5},
    }
    text = report.text(document)
    assert report.n_problems(document) == 2
    (row,) = [line.split() for line in text.splitlines() if line.startswith("daemon killed")]
    assert row == ["daemon", "killed", "2", "7", "0", "0", "0.250", "0.000", "0.400", "0.100", "1"]
    assert "WRONG at step 2 (daemon killed, h1, 3.0 s): udp lost 7 packets" in text
    assert "WRONG: h3 grew" in text
    assert SLACK >= 5

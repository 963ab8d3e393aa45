"""What /metrics says of a status document, in both formats, as Prometheus' own tools read it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import textwrap
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import openmetrics
from prometheus_client.openmetrics import parser as _openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from udptun._fastpath import COUNTERS
from udptun.control.answers import Answers
from udptun.control.http import Request, Response
from udptun.control.metrics import samples as made
from udptun.control.metrics.page import MetricsPage
from udptun.control.metrics.samples import counter_sample, daemon_samples, samples
from udptun.control.metrics.table import METRICS, Kind, Metric
from udptun.control.metrics.text import Format, Sample, format_for, render
from udptun.core.counter_words import COUNTERS as WORDS
from udptun.core.counter_words import CounterWords
from udptun.kernel.device_counters import read_device_counters
from udptun.kernel.process_usage import Usage, usage_of
from udptun.probing.liveness import Liveness

PLAIN, OPEN = Format(is_open_metrics=False), Format(is_open_metrics=True)
NOW_S = 1_700_000_000.0
EVERY_COUNTER = (*COUNTERS, "inject_drop_full", "drop_stranger")
Values = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]
"""Name and labels of a series -> its value."""

PEER = {
    "public_ip": "192.0.2.2",
    "port": 9000,
    "udptun": False,
    "liveness": "alive",
    "rtt_ms": 0.25,
    "path_mtu": 1400,
    "encap_packets": 11,
    "encap_bytes": 12,
    "decap_packets": 13,
    "decap_bytes": 14,
}
DOCUMENT: dict[str, Any] = {
    "store": 'local:/var/"lib"\\leases\n.db',
    "store_answers": True,
    "store_answered_at": NOW_S - 5.5,
    "network": "10.244.0.0/16",
    "lease": {"subnet": "10.244.1.0/24", "public_ip": "192.0.2.1", "expires_at": NOW_S + 7265},
    "underlay": {"mtu": 1500},
    "ipv6": {
        "mtu": 1452,
        "peers": [{"subnet": "fd00:2::/64", "public_ip": "192.0.2.2", "liveness": "alive", "decap_bytes": 1}],
    },
    "backend": {"type": "udp", "device": "flannel0", "mtu": 1472, "offloads": ["tso"]},
    "datapath": {
        "pid": 11,
        "started_at": NOW_S - 3600.5,
        "standby_pids": [12, 13],
        "stranger_filter": "ready",
        "shortcut": "on",
        "shortcut_detour": {"state": "on"},
        "cpu_s": 17.5,
        "memory_bytes": 9_000_000,
        "receive_queues": [
            {"worker": 0, "family": "ipv4", "waiting_bytes": 1, "limit_bytes": 2, "drops": 3},
            {"worker": 1, "family": "ipv4", "waiting_bytes": 4, "limit_bytes": 5, "drops": 6},
        ],
        "workers": ["running", "tun_lost"],
        "worker_counters": [{"encap_packets": 4, "decap_packets": 2, "encap_drop_ttl": 3, "decap_drop_ihl": 4}, {}],
    },
    "devices": [
        {
            "name": "flannel0",
            **{f"{way}_{it}": 7 for way in ("rx", "tx") for it in ("packets", "bytes", "errors", "dropped")},
        }
    ],
    "changes": [{"family": "ipv4", "object": "route", "desired": 5, "repairs": 1}],
    "peers": [
        PEER | {"subnet": "10.244.2.0/24"},
        PEER | {"subnet": "10.244.3.0/24", "port": None, "udptun": True, "liveness": "dead", "rtt_ms": None},
        PEER | {"subnet": "10.244.4.0/24", "liveness": "unknown", "rtt_ms": None, "path_mtu": None},
    ],
    "firewall": {"repairs": 8},
    "other_types": [{}],
    "skipped": ["a", "b"],
    "counters": {name: i for i, name in enumerate(EVERY_COUNTER, 100)},
    "problems": ["a", "b", "c"],
}
"""What the samples are made of, of a host with a datapath and both families."""
USAGE = Usage(1.25, 30_000_000)
LIVENESS = {Liveness.ALIVE: 1000, Liveness.DEAD: 1}


def all_samples(document: Mapping[str, Any] = DOCUMENT) -> list[Sample]:
    return [
        *daemon_samples("0.1.0", NOW_S - 60, USAGE, is_ready=True),
        *samples(document, LIVENESS),
    ]


def read(text: str, form: Format) -> Values:
    """As Prometheus' own Python library reads it."""
    parse = _openmetrics_parser.text_string_to_metric_families if form is OPEN else text_string_to_metric_families
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in parse(text):
        for it in family.samples:
            series = it.name, tuple(sorted(it.labels.items()))
            assert series not in found
            found[series] = it.value
    return found


def value(values: Values, name: str, **labels: str) -> float:
    return values[name, tuple(sorted(labels.items()))]


# --- the table


def test_names_follow_prometheus_rules() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS) > 50
    for metric in METRICS:
        assert re.fullmatch(r"(udptun|process)(_[a-z0-9]+)+", metric.name), metric.name
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        assert metric.name.endswith("_info") == (metric.kind is Kind.INFO), metric.name
        # No other units than the base ones, and nothing that the formats would have to quote.
        assert not re.search(r"_(ms|milliseconds|percent|kb|mb|kib|mib|minutes|hours)(_|$)", metric.name), metric.name
        assert re.fullmatch(r"[^\\\n\"]+\.", metric.help), metric.name
        assert all(re.fullmatch(r"[a-z][a-z0-9_]*", label) for label in metric.labels)


def test_the_page_lists_every_metric_in_its_order() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    documented = re.findall(r"^\* \*\*`\w+`\*\*.*\n(?:  .*\n)*", page, re.MULTILINE)
    assert documented == [item_of(metric) for metric in METRICS]


def test_the_page_has_each_reason_of_a_drop_in_the_words_of_status() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    row = r"^\| `(encap|decap|inject)` \| `(\w+)` \| (.*) \| \[.*\]\(wire-format.md#([\w-]+)\) \|$"
    rows = re.findall(row, page, re.MULTILINE)
    assert {f"{way}_drop_{reason}": CounterWords(words, section) for way, reason, words, section in rows} == {
        name: words for name, words in WORDS.items() if re.match("(encap|decap|inject)_drop_", name)
    }


def item_of(metric: Metric) -> str:
    """Its item in the lists of docs/metrics.md."""
    labels = "".join(f", `{label}`" for label in metric.labels)
    text = f"* **`{metric.name}`** ({metric.kind}{labels}): {metric.help}"
    return textwrap.fill(text, 120, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False) + "\n"


def test_every_counter_of_the_datapath_is_one_series() -> None:
    series = [(it.metric.name, it.labels) for it in map(counter_sample, EVERY_COUNTER, range(len(EVERY_COUNTER)))]
    assert len(set(series)) == len(EVERY_COUNTER)
    assert ("udptun_drops_total", ("decap", "unknown_peer")) in series


# --- samples


def test_document_with_everything_has_a_sample_of_every_metric() -> None:
    there = {it.metric for it in all_samples()}
    assert [metric.name for metric in METRICS if metric not in there] == []
    for sample in all_samples():
        assert len(sample.labels) == len(sample.metric.labels)


def test_samples_say_what_the_document_says() -> None:
    values = read(render(all_samples(), PLAIN), PLAIN)
    expected = [
        (1, "udptun_ready", {}),
        (NOW_S - 60, "process_start_time_seconds", {}),
        (1.25, "process_cpu_seconds_total", {}),
        (3, "udptun_problems", {}),
        (1472, "udptun_mtu_bytes", {"family": "ipv4"}),
        (1452, "udptun_mtu_bytes", {"family": "ipv6"}),
        (NOW_S + 7265, "udptun_lease_expiry_timestamp_seconds", {}),
        (NOW_S - 5.5, "udptun_store_answered_timestamp_seconds", {}),
        (1000, "udptun_peers", {"liveness": "alive"}),
        (0, "udptun_peers", {"liveness": "unknown"}),
        (2, "udptun_leases_skipped", {}),
        (1, "udptun_reconcile_changes_total", {"family": "ipv4", "object": "route", "cause": "repair"}),
        (5, "udptun_reconcile_changes_total", {"family": "ipv4", "object": "route", "cause": "desired"}),
        (8, "udptun_firewall_repairs_total", {}),
        (7, "udptun_device_transmit_drops_total", {"device": "flannel0"}),
        (1, "udptun_datapath_processes", {"device": "flannel0", "role": "active"}),
        (2, "udptun_datapath_processes", {"device": "flannel0", "role": "standby"}),
        (1, "udptun_offload_in_use", {"offload": "tso"}),
        (0, "udptun_offload_in_use", {"offload": "uso"}),
        (6, "udptun_receive_queue_drops_total", {"worker": "1", "family": "ipv4"}),
        (0, "udptun_worker_running", {"worker": "1"}),
        (4, "udptun_worker_encap_packets_total", {"worker": "0"}),
        (7, "udptun_worker_drops_total", {"worker": "0"}),
        (0.00025, "udptun_peer_rtt_seconds", {"peer": "10.244.2.0/24"}),
        (0, "udptun_peer_alive", {"peer": "10.244.3.0/24"}),
        (14, "udptun_peer_decap_bytes_total", {"peer": "10.244.4.0/24"}),
        (1, "udptun_peer_decap_bytes_total", {"peer": "fd00:2::/64"}),
    ]
    for number, name, labels in expected:
        assert value(values, name, **labels) == number, (name, labels)
    for name in EVERY_COUNTER:
        sample = counter_sample(name, DOCUMENT["counters"][name])
        labels = dict(zip(sample.metric.labels, sample.labels, strict=True))
        assert value(values, sample.metric.name, **labels) == DOCUMENT["counters"][name]
    assert not any(name == "udptun_peer_alive" and ("peer", "10.244.4.0/24") in labels for name, labels in values)


def test_host_without_a_datapath_has_no_series_of_one() -> None:
    peers = [{"subnet": "10.244.2.0/24", "public_ip": "192.0.2.2", "port": None, "udptun": True}]
    kernel = DOCUMENT | {"datapath": None, "counters": {}, "peers": peers, "ipv6": None}
    kernel["backend"] = {"type": "host-gw", "device": None, "mtu": 1500}
    names = {it.metric.name for it in all_samples(kernel)}
    assert "udptun_device_transmit_bytes_total" in names
    assert {it for it in names if it.startswith(("udptun_peer_", "udptun_encap", "udptun_datapath"))} == {
        "udptun_peer_info"
    }


def test_what_two_datapaths_count_is_summed_and_each_process_and_worker_stands_by_itself() -> None:
    """Where a VTEP has one for each family.

    The processes' time was summed, too: when one was replaced the sum fell, and rate() took all of it for new.
    """
    queue = {"worker": 0, "family": "ipv6", "waiting_bytes": 1, "limit_bytes": 2, "drops": 9}
    of_ipv6 = {
        **DOCUMENT["datapath"],
        "pid": 21, "started_at": NOW_S - 60, "cpu_s": 2.5, "receive_queues": [queue],
        "workers": ["running"], "worker_counters": [{"encap_packets": 8}],
    }
    ipv6 = DOCUMENT["ipv6"] | {"device": "flannel-v6.1", "datapath": of_ipv6, "counters": DOCUMENT["counters"]}
    values = read(render(all_samples(DOCUMENT | {"ipv6": ipv6}), PLAIN), PLAIN)
    for number, name, labels in [
        (1, "udptun_datapath_processes", {"device": "flannel0", "role": "active"}),
        (1, "udptun_datapath_processes", {"device": "flannel-v6.1", "role": "active"}),
        (2, "udptun_datapath_processes", {"device": "flannel-v6.1", "role": "standby"}),
        (17.5, "udptun_datapath_cpu_seconds_total", {"device": "flannel0"}),
        (2.5, "udptun_datapath_cpu_seconds_total", {"device": "flannel-v6.1"}),
        (9_000_000, "udptun_datapath_resident_memory_bytes", {"device": "flannel-v6.1"}),
        (NOW_S - 3600.5, "udptun_datapath_start_time_seconds", {"device": "flannel0"}),
        (NOW_S - 60, "udptun_datapath_start_time_seconds", {"device": "flannel-v6.1"}),
        (2 * DOCUMENT["counters"]["encap_sent"], "udptun_encap_sent_packets_total", {}),
        (2 * DOCUMENT["counters"]["decap_drop_vxlan_mac"], "udptun_drops_total", DROP),
        (3, "udptun_receive_queue_drops_total", {"worker": "0", "family": "ipv4"}),
        (9, "udptun_receive_queue_drops_total", {"worker": "ipv6-0", "family": "ipv6"}),
        (4, "udptun_worker_encap_packets_total", {"worker": "0"}),
        (8, "udptun_worker_encap_packets_total", {"worker": "ipv6-0"}),
    ]:
        assert value(values, name, **labels) == number, (name, labels)


DROP = {"direction": "decap", "reason": "vxlan_mac"}


def test_peers_of_ipv6_alone_stand_once() -> None:
    peer = PEER | {"subnet": "fd00:2::/64"}
    alone = DOCUMENT | {"lease": DOCUMENT["lease"] | {"subnet": "fd00:1::/64"}, "peers": [peer]}
    alone["ipv6"] = {"mtu": 1452, "peers": [peer]}
    values = read(render(all_samples(alone), PLAIN), PLAIN)
    assert value(values, "udptun_peer_alive", peer="fd00:2::/64") == 1
    assert [labels for name, labels in values if name == "udptun_mtu_bytes"] == [(("family", "ipv6"),)]


# --- text


def test_both_formats_say_the_same() -> None:
    plain, open_metrics = (render(all_samples(), form) for form in (PLAIN, OPEN))
    assert read(plain, PLAIN) == read(open_metrics, OPEN)
    assert open_metrics.endswith("\n# EOF\n")
    assert "# TYPE udptun_drops counter\n" in open_metrics
    assert "# TYPE udptun_build info\n" in open_metrics
    assert "# UNIT udptun_peer_rtt_seconds seconds\n" in open_metrics
    assert openmetrics.exposition.CONTENT_TYPE_LATEST.startswith("application/openmetrics-text")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's prometheus) is not installed")
def test_promtool_finds_nothing_to_say_about_names_and_text() -> None:
    plain = render(all_samples(), PLAIN)
    checked = subprocess.run(["promtool", "check", "metrics"], input=plain, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_labels_with_any_characters_arrive_as_they_are() -> None:
    for form in (PLAIN, OPEN):
        values = read(render(all_samples(), form), form)
        (labels,) = (dict(labels) for name, labels in values if name == "udptun_host_info")
        assert labels["store"] == DOCUMENT["store"]


PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;q=0.75,application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=0.0.4;q=0.25,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "is_open_metrics"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/json", False),
        (PROMETHEUS, True),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text; Version=1.0.0", True),
        ("application/openmetrics-text;q=0.2,text/plain;q=0.3", False),
        ("text/plain;q=0.5, application/openmetrics-text;q=0.5", True),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=0.000", False),
        ("application/openmetrics-text;q=nan", False),
        ("application/openmetrics-text;q=1e9,text/plain", False),
        ("application/openmetrics-text;q=high", False),
        ("application/openmetrics-text;q", False),
        (",;,;;q=,=,q=1;", False),
        ("application/openmetrics-text;;q=0.9;", True),
        ("\x00\xff", False),
    ],
)
def test_format_is_what_the_accept_header_asks_for(accept: str, is_open_metrics: bool) -> None:
    assert format_for(accept) == Format(is_open_metrics)


# --- the page


def answers(page: MetricsPage, accepts: Iterable[str]) -> list[tuple[str, str]]:
    async def ask() -> list[tuple[str, str]]:
        got = [await page.answer(Request("GET", "/metrics", {"accept": it})) for it in accepts]
        return [(it.content_type, it.body) for it in got]

    return asyncio.run(ask())


def test_each_client_gets_its_format() -> None:
    page = MetricsPage(lambda: daemon_samples("0.1.0", NOW_S, None, is_ready=False))
    (plain_type, plain), (open_type, open_metrics) = answers(page, ["", PROMETHEUS])
    assert plain_type == "text/plain; version=0.0.4; charset=utf-8"
    assert open_type == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert read(plain, PLAIN) == read(open_metrics, OPEN)
    assert value(read(plain, PLAIN), "udptun_ready") == 0


def test_the_health_port_has_no_metrics_where_nobody_wants_them_there() -> None:
    """They name the peers, and the port has to be open for whoever asks for health."""
    answers = Answers(lambda: "")
    assert set(answers.health(with_metrics=False)) == {"/healthz", "/readyz"}
    assert "/metrics" in answers.health(with_metrics=True)
    assert "/metrics" in answers.all


def test_daemon_that_is_not_ready_yet_says_so() -> None:
    answer = Answers(lambda: "waits for a lease").all["/metrics"](Request("GET", "/metrics"))
    assert not isinstance(answer, Response)

    async def body() -> str:
        return (await answer).body

    values = read(asyncio.run(body()), PLAIN)
    assert value(values, "udptun_ready") == 0
    assert {name for name, _ in values} == {
        "udptun_build_info",
        "udptun_ready",
        *(f"process_{it}" for it in ("cpu_seconds_total", "resident_memory_bytes", "start_time_seconds")),
    }


def test_a_flood_of_requests_costs_a_tenth_of_a_processor() -> None:
    """Of a text that took long to make, others get it as well, instead of one of their own each."""
    n = 0

    def costly() -> Iterable[Sample]:
        nonlocal n
        n += 1
        sum(range(1_000_000))
        return daemon_samples("0.1.0", NOW_S, None, is_ready=True)

    page = MetricsPage(costly)

    async def flood() -> None:
        await asyncio.gather(*(page.answer(Request("GET", "/metrics")) for _ in range(100)))

    asyncio.run(flood())
    assert 1 <= n < 20


def test_clients_that_leave_start_no_text_beside_the_one_being_made() -> None:
    """A client turned out while its text was made let the next one start another thread: up to as many as all other
    answers share.
    """
    n, may_end = 0, threading.Event()

    def slow() -> Iterable[Sample]:
        nonlocal n
        n += 1
        may_end.wait(60)
        return daemon_samples("0.1.0", NOW_S, None, is_ready=True)

    page = MetricsPage(slow)

    async def come_and_go() -> Response:
        for _ in range(5):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await page.answer(Request("GET", "/metrics"))
        waiting = asyncio.create_task(page.answer(Request("GET", "/metrics")))
        await asyncio.sleep(0)
        may_end.set()
        return await waiting

    assert "udptun_ready 1" in asyncio.run(come_and_go()).body
    assert n == 1


def test_a_text_that_could_not_be_made_is_tried_again() -> None:
    failures = [ZeroDivisionError()]

    def once_broken() -> Iterable[Sample]:
        if failures:
            raise failures.pop()
        return daemon_samples("0.1.0", NOW_S, None, is_ready=True)

    page = MetricsPage(once_broken)
    with pytest.raises(ZeroDivisionError):
        answers(page, [""])
    assert "udptun_ready 1" in answers(page, [""])[0][1]


def test_samples_are_made_of_nothing_but_values() -> None:
    assert json.loads(json.dumps(DOCUMENT)) == DOCUMENT
    assert set(made.COUNTERS) < set(EVERY_COUNTER)


def test_usage_is_that_of_the_process() -> None:
    usage = usage_of(os.getpid())
    assert usage is not None
    assert abs(usage.cpu_s - time.process_time()) < 0.5
    assert usage.memory_bytes > 10_000_000
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    assert usage_of(gone.pid) is None


def test_device_counters_are_those_of_ip() -> None:
    assert read_device_counters([]) == {}
    found = read_device_counters(["lo", "none"])
    assert found.keys() == {"lo"}
    shown = json.loads(subprocess.run(["ip", "-s", "-j", "link", "show", "lo"], capture_output=True, check=True).stdout)
    assert found["lo"].rx_packets <= shown[0]["stats64"]["rx"]["packets"]
    assert found["lo"].tx_bytes <= shown[0]["stats64"]["tx"]["bytes"]

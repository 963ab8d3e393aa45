"""/metrics of running daemons: it agrees with the status document, the kernel, the other host and the packets."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_open_metrics
from prometheus_client.parser import text_string_to_metric_families as read_plain
from traffic import ping, read_status, socket_in, udp_flow, wait_for_peers, wait_until_counted

from udptun.control.metrics.samples import counter_sample
from udptun.core.counter_words import is_drop
from udptun.datapath.stats import Stats
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
PORT, PROMETHEUS_PORT = 8081, 9090

Series = Mapping[str, float]
"""`name{label="value",...}` -> value; the labels in the order of their names."""


def request(host: Host, method: str = "GET", accept: str = "") -> tuple[str, str]:
    """Head and body of the answer at the daemon's socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(host.path("/run/udptun/udptun.sock")))
        connection.sendall(f"{method} /metrics HTTP/1.1\r\nAccept: {accept}\r\n\r\n".encode())
        head, _, body = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 ")
    return head, body


def read(text: str, parse: Callable[[str], Iterable[Metric]] = read_plain) -> Series:
    samples = [it for family in parse(text) for it in family.samples]
    series = {name_of(it.name, **it.labels): it.value for it in samples}
    assert len(series) == len(samples)
    return series


def name_of(metric: str, **labels: str) -> str:
    said = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{metric}{{{said}}}"


def scrape(host: Host) -> Series:
    """All series as they are now.  A text that took long to make is served for a while, so another is waited for.

    Making one takes processor time, so sooner or later that series differs.
    """
    _, before = request(host)
    wait_until("new figures", lambda: request(host)[1] != before, 10)
    return read(request(host)[1])


def counters_in(series: Series, names: Iterable[str]) -> dict[str, float]:
    """The datapath's counters by the names that the status document has them by."""
    found = {}
    for name in names:
        sample = counter_sample(name, 0)
        found[name] = series[name_of(sample.metric.name, **dict(zip(sample.metric.labels, sample.labels, strict=True)))]
    return found


def peer_packets(host: Host, of: Host, way: str) -> float:
    return scrape(host)[name_of(f"udptun_peer_{way}_packets_total", peer=str(of.subnet))]


def counters_in_memory(host: Host) -> dict[str, int]:
    """The datapath's own, out of the memory that its workers write."""
    pid = read_status(host)["datapath"]["pid"]
    (file,) = (it for it in host.path(f"/proc/{pid}/fd").iterdir() if "udptun-stats" in str(it.readlink()))
    stats = Stats(os.open(file, os.O_RDWR))
    try:
        return stats.counters()
    finally:
        stats.close()


def drops_of(host: Host) -> dict[str, int]:
    return {name: n for name, n in read_status(host)["counters"].items() if is_drop(name) and n}


def drops_on_the_screen(host: Host) -> dict[str, int]:
    said = host.run([sys.executable, "-m", "udptun", "status"]).stdout
    rows = re.findall(r"^ +([\d,]+) +\S+ +.*? {2,}(\w*drop_\w+)", said, re.MULTILINE)
    return {name: int(n.replace(",", "")) for n, name in rows}


def test_metrics_status_its_screen_and_the_datapath_count_the_same_packets(pair: Lab) -> None:
    """And the other host does, as far as it can."""
    one, two = pair.hosts
    # Nobody leases this: each is dropped.
    one.run(["ping", "-c", "3", "-i", "0.05", "-W", "0.2", "10.244.250.1"], check=False)

    def n_probes() -> int:
        """Of both hosts; each is answered."""
        return sum(read_status(host)["counters"]["inject_sent"] for host in pair.hosts)

    wait_until_counted(one, two)
    probed = n_probes()
    sent, received = peer_packets(one, two, "encap"), peer_packets(two, one, "decap")
    with udp_flow(one.pod(1), two.pod(1), 500) as flow:
        before = read(request(one)[1])
        status = read_status(one)
        after = scrape(one)
        flow.wait_for_more(300)
    wait_until_counted(one, two)
    names = status["counters"]
    for name in names:
        assert counters_in(before, [name])[name] <= names[name] <= counters_in(after, [name])[name]
    n_sent, n_received = peer_packets(one, two, "encap") - sent, peer_packets(two, one, "decap") - received
    # Probes are packets, too, and the longer this takes the more of them there are.
    most = flow.report.sent + 60 + n_probes() - probed
    assert flow.report.sent <= n_sent <= most
    assert flow.report.sent <= n_received <= most

    def agree() -> bool:
        """Whether nothing came in between, and then all are the same."""
        status, series, own, later = read_status(one), scrape(one), counters_in_memory(one), read_status(one)
        shown = json.loads(one.run(["ip", "-s", "-j", "link", "show", "flannel0"]).stdout)[0]["stats64"]
        if (status["counters"], status["devices"]) != (later["counters"], later["devices"]):
            return False
        assert counters_in(series, status["counters"]) == status["counters"]
        assert series[name_of("udptun_device_transmit_packets_total", device="flannel0")] == shown["tx"]["packets"]
        assert series[name_of("udptun_device_receive_bytes_total", device="flannel0")] == shown["rx"]["bytes"]
        # The daemon adds what it counts itself.
        assert status["counters"] | own == status["counters"]
        (peer,) = status["peers"]
        for key in ("encap_packets", "encap_bytes", "decap_packets", "decap_bytes"):
            assert series[name_of(f"udptun_peer_{key}_total", peer=peer["subnet"])] == peer[key]
        assert series[name_of("udptun_peers", liveness=peer["liveness"])] == 1
        assert series[name_of("udptun_ready")] == 1
        return True

    wait_until("a moment without packets", agree, 30)

    def agrees_with_its_screen() -> bool:
        """Which looks twice, half a second apart."""
        before, on_screen, after = drops_of(one), drops_on_the_screen(one), drops_of(one)
        assert before != after or on_screen == before
        return before == after

    wait_until("a moment without drops", agrees_with_its_screen, 30)
    assert drops_of(one)["encap_drop_no_route"] >= 3


def test_each_client_gets_its_format_and_head_has_no_body(pair: Lab) -> None:
    one = pair.host(1)
    head, plain = request(one)
    assert "\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n" in head
    head, text = request(one, accept="application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert "\r\nContent-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n" in head
    assert read(text, read_open_metrics).keys() == read(plain).keys()
    head, body = request(one, "HEAD", accept="no;such,,;q=x")
    assert "\r\nContent-Type: text/plain" in head
    assert body == ""


def test_a_repair_is_counted_and_is_no_change_of_ours(pair: Lab) -> None:
    one, two = pair.hosts

    def changes() -> tuple[float, float]:
        series = scrape(one)
        labels = {"family": "ipv4", "object": "route"}
        by_cause = [name_of("udptun_reconcile_changes_total", cause=it, **labels) for it in ("desired", "repair")]
        return series[by_cause[0]], series[by_cause[1]]

    desired, repairs = changes()
    assert desired >= 1
    one.run(["ip", "route", "del", "10.244.0.0/16", "dev", "flannel0"])
    wait_until("the repair", lambda: changes()[1] > repairs, 10)
    # A busy machine may have it repair more than this.
    assert changes()[0] == desired
    ping(one.pod(1), two.pod(1).address)


@pytest.fixture
def one_peer_shown(three_hosts: Lab) -> Iterator[Lab]:
    """The daemon of h1 has --metrics-peers=1, and a port for Prometheus."""
    one = three_hosts.host(1)
    one.stop_daemon()
    one.start_daemon(["--metrics-peers=1", f"--healthz-port={PORT}"])
    one.wait_ready()
    yield three_hosts
    one.stop_daemon()
    one.start_daemon()
    one.wait_ready()
    wait_for_peers(three_hosts)


def test_the_busiest_peers_have_series_of_their_own_and_all_are_counted(one_peer_shown: Lab) -> None:
    one, *others = one_peer_shown.hosts

    def shown() -> list[str]:
        return [it for it in scrape(one) if it.startswith("udptun_peer_encap_bytes_total")]

    wait_for_peers(one_peer_shown)
    for n, other in enumerate(others, 1):
        ping(one.pod(1), other.pod(1).address, "-s", str(1000 * n), count=10 * n)
        busiest = [name_of("udptun_peer_encap_bytes_total", peer=str(other.subnet))]
        wait_until("the busiest", lambda busiest=busiest: shown() == busiest, 10)
    series = scrape(one)
    assert sum(n for name, n in series.items() if name.startswith("udptun_peers{")) == 2
    assert len(read_status(one)["peers"]) == 2


@pytest.mark.parametrize(("backend", "device"), [("udp", "flannel0"), ("host-gw", "")])
def test_hosts_of_both_families_have_metrics_with_a_datapath_and_without(backend: str, device: str) -> None:
    conf = {
        "Network": "10.244.0.0/16",
        "EnableIPv6": True,
        "IPv6Network": "fd00:244::/48",
        "Backend": {"Type": backend},
    }
    with Lab(f"m{os.getpid()}", n_hosts=2, n_pods=0, net_conf=conf, ipv6=True) as lab:
        lab.start()
        wait_for_peers(lab)
        one, two = lab.hosts
        series = scrape(one)
        (said,) = (it for it in series if it.startswith("udptun_host_info"))
        assert f'backend="{backend}",device="{device}"' in said
        peers = {it for it in series if it.startswith("udptun_peer_info")}
        assert len(peers) == 2
        assert sum(str(two.subnet) in it for it in peers) == 1
        assert sum(n for name, n in series.items() if name.startswith("udptun_peers{")) == 1
        assert ('udptun_worker_running{worker="0"}' in series) == (backend == "udp")
        assert (name_of("udptun_device_transmit_bytes_total", device=device) in series) == bool(device)

        def is_the_same_in_open_metrics() -> bool:
            """A measurement that comes between the two requests is a series more."""
            _, text = request(one, accept="application/openmetrics-text")
            return read(text, read_open_metrics).keys() == read(request(one)[1]).keys()

        wait_until("the same series in both formats", is_the_same_in_open_metrics, 30)


# --- Prometheus itself


@contextmanager
def prometheus(host: Host, directory: Path) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """One on the host, that scrapes the daemon there with the rules of deploy/monitoring; asks it a query."""
    shutil.copy(MONITORING / "udptun.rules.yml", directory)
    (directory / "prometheus.yml").write_text(
        "global: {scrape_interval: 500ms, evaluation_interval: 500ms}\n"
        "rule_files: [udptun.rules.yml]\n"
        f"scrape_configs: [{{job_name: udptun, static_configs: [{{targets: ['127.0.0.1:{PORT}']}}]}}]\n"
    )
    where = [f"--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}", f"--storage.tsdb.path={directory}/data"]
    command = ["prometheus", f"--config.file={directory}/prometheus.yml", "--log.level=warn", *where]

    def get(path: str) -> Any:
        with socket_in(host, socket.SOCK_STREAM) as connection:
            connection.settimeout(10)
            connection.connect(("127.0.0.1", PROMETHEUS_PORT))
            connection.sendall(f"GET {path} HTTP/1.0\r\nHost: h\r\n\r\n".encode())
            return json.loads(b"".join(iter(lambda: connection.recv(1 << 16), b"")).partition(b"\r\n\r\n")[2])

    def ask(query: str) -> list[dict[str, Any]]:
        answer = get(f"/api/v1/query?query={urllib.parse.quote(query)}")
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def is_up() -> bool:
        try:
            return [it["value"][1] for it in ask("up")] == ["1"]
        except (ConnectionError, json.JSONDecodeError):
            return False

    with host.popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until("the first scrape", is_up, 30)
            yield ask
        finally:
            process.kill()


@pytest.mark.full
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_prometheus_scrapes_a_host_and_answers_every_query_of_the_dashboard(
    one_peer_shown: Lab, tmp_path: Path
) -> None:
    one, *others = one_peer_shown.hosts
    wait_for_peers(one_peer_shown)
    shown = next(it for it in others if name_of("udptun_peer_encap_bytes_total", peer=str(it.subnet)) in scrape(one))
    targets = [
        it
        for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]
        for it in panel.get("targets", [])
    ]
    with prometheus(one, tmp_path) as ask, udp_flow(one.pod(1), shown.pod(1), 200):

        def answers() -> dict[str, list[dict[str, Any]]]:
            return {it["expr"]: ask(concrete(it["expr"])) for it in targets}

        def concrete(query: str) -> str:
            return re.sub(r"\$(\w+)", lambda found: {"instance": ".*", "job": "udptun"}.get(found[1], "10s"), query)

        empty_when_well = ("dead", "alive", "drops", "mtu", "repairs", "changes")

        def all_have_data() -> bool:
            empty = [query for query, found in answers().items() if not found]
            return all(any(word in query for word in empty_when_well) for query in empty)

        wait_until("data for every panel", all_have_data, 30)
        (packets,) = ask('rate(udptun_encap_packets_total{job="udptun"}[10s])')
        assert float(packets["value"][1]) > 0
        assert [it["metric"]["alertname"] for it in ask("ALERTS")] == []

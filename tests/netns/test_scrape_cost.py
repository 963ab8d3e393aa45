"""What it costs a host with 1,000 peers to be looked at each second, with a TCP stream at full speed.

By a scrape of /metrics, or by `udptun status --watch`.
"""

from __future__ import annotations

import os
import pty
import select
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
from traffic import processes, read_status, tcp_stream, wait_for_peers

from bench import bulk_leases
from tests.conftest import Figure
from udptun.lab.host import Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES, Lab

pytestmark = [pytest.mark.netns, pytest.mark.alone, pytest.mark.full]

N_PEERS = 1000
ROUNDS, SECONDS = 12, 3.0


def scrape(host: Host) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(host.path("/run/udptun/udptun.sock")))
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(1 << 20), b""))


@contextmanager
def scraped(host: Host, period_s: float) -> Iterator[None]:
    """A scrape each `period_s` while the block runs."""
    is_over = threading.Event()

    def work() -> None:
        while not is_over.wait(period_s):
            scrape(host)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextmanager
def watched(host: Host) -> Iterator[int]:
    """`udptun status --watch` runs on a terminal of the host while the block does; its pid, once there is a screen."""
    ours, theirs = pty.openpty()
    command = ["env", "TERM=xterm", sys.executable, "-m", "udptun", "status", "--watch"]
    with host.popen(command, stdin=theirs, stdout=theirs) as viewer:
        os.close(theirs)
        screen = b""
        deadline_s = time.monotonic() + 30
        while b"IN bit/s" not in screen:
            assert select.select([ours], [], [], max(0.0, deadline_s - time.monotonic()))[0], screen
            screen += os.read(ours, 65536)

        def drain() -> None:
            while True:
                try:
                    os.read(ours, 65536)
                except OSError:
                    # EIO: nobody has the terminal any more.
                    return

        thread = threading.Thread(target=drain)
        thread.start()
        try:
            (pid,) = (pid for pid, words in processes(host).items() if words.endswith("status --watch"))
            yield pid
        finally:
            os.write(ours, b"q")
            viewer.wait(30)
            thread.join()
            os.close(ours)


def cpu_s(host: Host, pid: int) -> float:
    """Of all threads of the process, to the nanosecond."""
    threads = host.path(f"/proc/{pid}/task").iterdir()
    return sum(int((it / "schedstat").read_text().split()[0]) for it in threads) / 1e9


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Two hosts, each with 1,000 peers more that do not exist, and series of each."""
    network = "10.224.0.0/11"
    conf = {"Network": network, "Backend": {"Type": "udp", "Probe": False}}
    with Lab("scrape", net_conf=conf) as lab:
        lab.daemon_command.append(f"--metrics-peers={N_PEERS + 1}")
        lab.start()
        wait_for_peers(lab)
        lab.host(1).run([sys.executable, bulk_leases.__file__, str(LEASES), network, str(N_PEERS)])
        for host in lab.hosts:
            wait_until("all peers", lambda host=host: len(read_status(host)["peers"]) == N_PEERS + 1, 30)
        yield lab


@dataclass(slots=True)
class Window:
    gbit_per_s: float
    daemon_ms_per_s: float


def window(host: Host, pid: int) -> Window:
    def received() -> int:
        return int(host.path("/sys/class/net/flannel0/statistics/rx_bytes").read_text())

    before, cpu_before_s, began_s = received(), cpu_s(host, pid), time.monotonic()
    time.sleep(SECONDS)
    elapsed_s, work_s = time.monotonic() - began_s, cpu_s(host, pid) - cpu_before_s
    return Window((received() - before) * 8e-9 / elapsed_s, 1000 * work_s / elapsed_s)


@pytest.mark.timeout(300)
def test_a_scrape_each_second_costs_the_forwarding_rate_nothing(lab: Lab, figure: Figure) -> None:
    """Windows with and without scrapes take turns, so that what else changes on the machine concerns both."""
    one = lab.host(1)
    pid = int(read_status(one)["pid"])
    text = scrape(one)
    assert text.count(b"\nudptun_peer_encap_bytes_total{") == N_PEERS + 1
    quiet, busy = [], []
    with tcp_stream(lab):
        for i in range(ROUNDS):
            for is_scraped in (i % 2 == 1, i % 2 == 0):
                with scraped(one, 1.0) if is_scraped else nullcontext():
                    (busy if is_scraped else quiet).append(window(one, pid))
    ratios = [with_it.gbit_per_s / without.gbit_per_s for without, with_it in zip(quiet, busy, strict=True)]
    cost = statistics.median(it.daemon_ms_per_s for it in busy) - statistics.median(it.daemon_ms_per_s for it in quiet)
    for name, windows in (("without", quiet), ("with", busy)):
        print(f"Gbit/s {name} scrapes:", *(f"{it.gbit_per_s:.2f}" for it in windows))
        print(f"the daemon's ms a second {name} scrapes:", *(f"{it.daemon_ms_per_s:.1f}" for it in windows))
    figure("rate without scrapes", [it.gbit_per_s for it in quiet], "Gbit/s")
    figure("rate with one a second", [it.gbit_per_s for it in busy], "Gbit/s")
    figure("the second as a share of the first", ratios)
    figure(f"the daemon's work for a scrape of {len(text) // 1024} KiB", cost, "ms")
    # Windows of one kind differ by more than this where anything else runs on the machine. Times may be five times
    # those of tests/results.
    assert statistics.median(ratios) > 0.9
    assert cost < 125


@pytest.mark.timeout(300)
def test_a_status_that_is_watched_costs_the_forwarding_rate_nothing(lab: Lab, figure: Figure) -> None:
    """The daemon makes its document each second, and the viewer reads it and draws a screen."""
    one = lab.host(1)
    pid = int(read_status(one)["pid"])
    quiet, busy, viewer = [], [], []
    with tcp_stream(lab):
        for i in range(ROUNDS):
            for is_watched in (i % 2 == 1, i % 2 == 0):
                if not is_watched:
                    quiet.append(window(one, pid))
                    continue
                with watched(one) as viewer_pid:
                    before_s, began_s = cpu_s(one, viewer_pid), time.monotonic()
                    busy.append(window(one, pid))
                    viewer.append(1000 * (cpu_s(one, viewer_pid) - before_s) / (time.monotonic() - began_s))
    ratios = [with_it.gbit_per_s / without.gbit_per_s for without, with_it in zip(quiet, busy, strict=True)]
    cost = statistics.median(it.daemon_ms_per_s for it in busy) - statistics.median(it.daemon_ms_per_s for it in quiet)
    for name, windows in (("without", quiet), ("with", busy)):
        print(f"Gbit/s {name} a watched status:", *(f"{it.gbit_per_s:.2f}" for it in windows))
        print(f"the daemon's ms a second {name}:", *(f"{it.daemon_ms_per_s:.1f}" for it in windows))
    print("the viewer's ms a second:", *(f"{it:.1f}" for it in viewer))
    figure("rate without a watched status", [it.gbit_per_s for it in quiet], "Gbit/s")
    figure("rate with one", [it.gbit_per_s for it in busy], "Gbit/s")
    figure("the second as a share of the first", ratios)
    figure("the daemon's work for a look", cost, "ms")
    figure("the viewer's", viewer, "ms")
    # As above.
    assert statistics.median(ratios) > 0.9
    assert cost < 140
    assert statistics.median(viewer) < 85

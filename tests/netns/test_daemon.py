"""The daemon as its operator meets it: signals, reload, readiness, what it writes and says while it runs."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from traffic import (
    CLEANUP,
    datapath_pids,
    kill,
    locked_database,
    ping,
    read_status,
    socket_in,
    tcp_flow,
    udp_flow,
    wait_for_peers,
    wait_until_counted,
)

from udptun.lab.host import SUBNET_ENV, Host
from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES, NET_CONF, Lab

pytestmark = pytest.mark.netns

UDPTUN = [sys.executable, "-m", "udptun"]
DAEMON = [*UDPTUN, "daemon", "--store", f"local:{LEASES}", "--net-config-path", str(NET_CONF)]
AS_FLANNELD = "import sys; sys.argv[0] = '/opt/bin/flanneld'; from udptun.commands.cli import main; main()"
FLANNELD = [sys.executable, "-c", AS_FLANNELD]
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "status.md"


@pytest.fixture
def pair(pair: Lab) -> Iterator[Lab]:
    """The configuration is put back after each test."""
    yield pair
    reload(pair.host(1), {})


def start_again(lab: Lab, *flags: str) -> tuple[Host, int]:
    """Host 2 with a new daemon that has its peers, and where in the log that daemon begins."""
    host = lab.host(2)
    host.stop_daemon()
    begin = len(host.daemon_log())
    host.start_daemon(flags)
    host.wait_ready()
    wait_for_peers(lab)
    return host, begin


RENEWED_SOON = """if True:
    import sqlite3, sys, time
    db = sqlite3.connect(sys.argv[1])
    db.execute("update leases set expires = ? where key = ?", (time.time() + 600, sys.argv[2]))
    db.commit()
"""
"""A lease that ends in ten minutes is renewed at once."""


def test_log_for_programs_is_an_object_a_line_and_an_idle_daemon_is_silent(
    pair: Lab, request: pytest.FixtureRequest
) -> None:
    """A day of a healthy host had a line: its lease was renewed."""
    host, begin = start_again(pair, "--log-format=json")
    try:
        lines = [json.loads(line) for line in host.daemon_log()[begin:].splitlines()]
        (ready,) = [line for line in lines if line["message"] == "ready"]
        assert ready == {
            "time": ready["time"],
            "level": "info",
            "logger": "udptun.control.daemon",
            "message": "ready",
            "subnet": read_status(host)["lease"]["subnet"],
            "mtu": 1472,
            "n_peers": ready["n_peers"],
        }
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", ready["time"])
        assert {"backend chosen", "lease acquired", "underlay chosen"} <= {line["message"] for line in lines}
        # What was there before the daemon is adopted, and what is said of that comes soon.
        time.sleep(2)
        idle = len(host.daemon_log())
        lease = read_status(host)["lease"]
        host.run([sys.executable, "-c", RENEWED_SOON, str(LEASES), lease["subnet"].replace("/", "-")])
        time.sleep(60 if request.config.getoption("--full") else 4)
        wait_until("the renewal", lambda: read_status(host)["lease"]["expires_at"] > lease["expires_at"], 30)
        assert host.daemon_log()[idle:] == ""
    finally:
        start_again(pair)


def test_config_show_says_what_the_running_daemon_uses_and_why(pair: Lab) -> None:
    host = pair.host(1)

    def shown(name: str) -> tuple[object, str]:
        document = json.loads(host.run([*UDPTUN, "config", "show", "--json"]).stdout)
        assert document["daemon"]["pid"] == read_status(host)["pid"]
        assert document["problems"] == []
        (row,) = [it for it in document["keys"] + document["flags"] if it["name"] == name]
        return row["value"], row["source"]

    assert shown("--store") == (f"local:{LEASES}", "--store")
    assert shown("Network") == ("10.244.0.0/16", str(NET_CONF))
    assert shown("Backend.MTU") == (None, "the interface's")
    reload(host, {"MTU": 1400, "Port": 9999})
    assert shown("Backend.MTU") == (1400, str(NET_CONF))
    assert shown("Backend.Port") == (8285, f"{NET_CONF} as it was at the start; a restart brings 9999")
    # Pods of later tests would be told of the smaller MTU, and remember it.
    reload(host, {})
    wait_until("flannel0 to get its MTU back", lambda: mtu_of_device(host) == 1472, 10)


def mtu_of_device(host: Host) -> int:
    return int(host.path("/sys/class/net/flannel0/mtu").read_text())


def conf(**backend: object) -> str:
    return json.dumps({"Network": "10.244.0.0/16", "Backend": {"Type": "udp", **backend}})


def reload(host: Host, backend: Mapping[str, object] | str) -> str:
    """Change the configuration, send SIGHUP, wait until it is over; what the daemon has logged meanwhile."""
    assert host.daemon is not None
    before = len(host.daemon_log())
    host.path(NET_CONF).write_text(backend if isinstance(backend, str) else conf(**backend))
    host.daemon.send_signal(signal.SIGHUP)
    host.wait_ready()
    return host.daemon_log()[before:]


def messages(log: str, level: str) -> list[str]:
    return [line.split(": ", 1)[1] for line in log.splitlines() if line.split(" ", 3)[2] == level]


def left_behind(host: Host) -> list[str]:
    left = ["flannel0"] if host.path("/sys/class/net/flannel0").exists() else []
    left += host.run(["ip", "route", "show", "proto", "158"]).stdout.splitlines()
    left += [f"process {pid}" for pid in datapath_pids(host)]
    left += [line for line in host.run(["iptables-save"]).stdout.splitlines() if "FLANNEL" in line]
    left += [SUBNET_ENV] if host.path(SUBNET_ENV).exists() else []
    return left + [line for line in sql(host, "select key from leases").splitlines() if host.path(LEASES).exists()]


def sql(host: Host, statement: str) -> str:
    """What the statement gives in the lease database, run inside; nothing while there is no database."""
    script = (
        "import os, sqlite3, sys\n"
        "if os.path.exists(sys.argv[1]):\n"
        "    db = sqlite3.connect(sys.argv[1], timeout=10)\n"
        "    if db.execute('select 1 from sqlite_master').fetchone():\n"
        "        for row in db.execute(sys.argv[2]): print(*row)\n"
        "        db.commit()\n"
    )
    return host.run([sys.executable, "-c", script, str(LEASES), statement]).stdout


def get(host: Host, path: str, port: int) -> tuple[int, str]:
    """Status and body of an HTTP request from the host itself."""
    with socket_in(host, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(("127.0.0.1", port))
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    head, body = answer.split("\r\n\r\n", 1)
    return int(head.split()[1]), body


# --- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_daemon_ends_with_0_within_a_second_and_the_tunnel_stays(
    host: Host, number: signal.Signals, slack: int
) -> None:
    host.start_daemon()
    host.wait_ready()
    start = time.monotonic()
    assert host.stop_daemon(number) == 0
    assert time.monotonic() - start < 1 * slack
    assert len(datapath_pids(host)) == 2
    assert "state UNKNOWN" in host.run(["ip", "link", "show", "up", "dev", "flannel0"]).stdout
    assert messages(host.daemon_log(), "I")[-1] == (
        "stopped; packets are carried on without the daemon, `udptun cleanup` ends and removes it all"
    )


@pytest.mark.parametrize("second", [None, signal.SIGTERM, signal.SIGINT])
def test_a_state_directory_that_hangs_holds_the_end_up_for_seconds_and_not_against_a_second_signal(
    host: Host, second: signal.Signals | None
) -> None:
    """Before, the daemon waited for its thread that wrote the lease table: it stayed for as long as the file system was
    frozen, and a second SIGTERM was lost."""
    fifo = host.path("/var/lib/udptun/.last-leases.json.new")
    fifo.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(fifo)
    host.start_daemon()
    host.wait_ready()
    assert host.daemon is not None
    began = time.monotonic()
    host.daemon.send_signal(signal.SIGTERM)
    if second is None:
        assert host.daemon.wait(15) == 0
        (warning,) = messages(host.daemon_log(), "W")[-1:]
        assert "the lease table is not saved" in warning
        assert "ETIMEDOUT" in warning
    else:
        wait_until("the first signal to be taken", lambda: not handles_sigterm(host.daemon.pid), 5)
        host.daemon.send_signal(second)
        assert host.daemon.wait(15) == -second
        assert time.monotonic() - began < 4
    fifo.unlink()
    assert len(datapath_pids(host)) == 2


@pytest.mark.parametrize("n_moments", [8, pytest.param(60, marks=pytest.mark.full)])
def test_daemon_ends_with_0_and_leaves_nothing_when_signalled_at_any_moment_of_its_start(
    host: Host, n_moments: int
) -> None:
    said = host.path("/run/said")

    def start() -> subprocess.Popen[str]:
        with said.open("w") as output:
            process = host.popen(DAEMON, stderr=output)
        # Before it has handlers the interpreter is still starting, and nobody can make it end with 0.
        wait_until("handlers", lambda: handles_sigterm(process.pid), 10)
        return process

    def is_ready() -> bool:
        return " ready subnet=" in said.read_text()

    def end(process: subprocess.Popen[str], number: signal.Signals) -> None:
        process.send_signal(number)
        assert process.wait(10) == 0, said.read_text()
        assert not messages(said.read_text(), "E")

    whole = start()
    began = time.monotonic()
    wait_until("the daemon to be ready", is_ready, 10)
    start_s = time.monotonic() - began
    end(whole, signal.SIGTERM)
    host.run([*CLEANUP, "--release"])
    n_unready = i = 0
    while i < n_moments or n_unready < n_moments / 2:
        assert i < 4 * n_moments, f"only {n_unready} starts were interrupted before they were ready"
        process = start()
        wait_s = start_s * (i % n_moments) / n_moments
        time.sleep(wait_s)
        end(process, signal.SIGINT if i % 2 else signal.SIGTERM)
        n_unready += not is_ready()
        if is_ready():
            # The first one took longer, because the machine was busy, for example.
            start_s = min(start_s, wait_s)
            host.run([*CLEANUP, "--release"])
        assert left_behind(host) == [], f"at moment {i} of {n_moments}: {said.read_text()}"
        i += 1
    print(f"{n_unready} of {i} starts of at least {start_s:.2f} s were interrupted before they were ready")


def handles_sigterm(pid: int) -> bool:
    return signal.SIGTERM in signals_of(pid, "SigCgt")


def signals_of(pid: int, mask: str) -> set[int]:
    """The numbers in one of the masks of /proc/PID/status."""
    found = re.search(rf"^{mask}:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    bits = int(found[1], 16) if found else 0
    return {number for number in range(1, 65) if bits >> (number - 1) & 1}


def test_a_signal_that_does_nothing_to_flanneld_does_not_end_the_daemon_or_its_datapath(host: Host) -> None:
    """Before, SIGUSR1, which scripts for log rotation send, ended the daemon, at the start and later."""
    stray = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGALRM, signal.SIGIO, signal.SIGPWR, 34, 64]
    daemon = host.popen([*FLANNELD, *DAEMON[len(UDPTUN) + 1 :]])
    wait_until("the daemon to ignore them", lambda: {*stray} <= signals_of(daemon.pid, "SigIgn"), 10)
    while not host.path(SUBNET_ENV).exists():
        for number in stray:
            daemon.send_signal(number)
        assert daemon.poll() is None
        time.sleep(0.02)
    pids = datapath_pids(host)
    for number in stray:
        for pid in (daemon.pid, *pids):
            os.kill(pid, number)
    assert read_status(host)["datapath"]["pid"] in pids
    assert datapath_pids(host) == pids
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(10) == 0


def test_control_c_on_a_terminal_ends_the_daemon_alone_and_says_how_to_clean_up(host: Host) -> None:
    ours, terminal = pty.openpty()
    try:
        # A session of its own on the terminal: ^C there reaches its foreground process group.
        daemon = host.popen(["setsid", "--ctty", *DAEMON], stdin=terminal, stdout=terminal, stderr=terminal)
        os.close(terminal)
        said = read_until(ours, " ready subnet=")
        os.write(ours, b"\x03")
        assert daemon.wait(10) == 0
        said += read_until(ours, "`udptun cleanup` ends and removes it")
    finally:
        os.close(ours)
    assert "Traceback" not in said
    assert len(datapath_pids(host)) == 2


def read_until(fd: int, text: str) -> str:
    got = ""
    deadline = time.monotonic() + 20
    while text not in got:
        assert time.monotonic() < deadline, got
        got += os.read(fd, 4096).decode()
    return got


def test_cleanup_leaves_the_host_as_it_was_and_can_be_repeated(host: Host) -> None:
    def state() -> list[str]:
        commands = ("ip -o link", "ip -o addr", "ip route show table all", "find /run/udptun /run/flannel -not -type d")
        found = [host.run(["sh", "-c", f"{command} 2>/dev/null || true"]).stdout for command in commands]
        # The kernel tells the state of a carrier up to a second late, and eth0 is new.
        return [re.sub(r"<[A-Z_,-]+>|state [A-Z]+", "", text) for text in found]

    before = state()
    assert host.run(CLEANUP).stdout == ""
    host.start_daemon()
    host.wait_ready()
    refused = host.run(CLEANUP, check=False)
    assert refused.returncode == 1
    assert re.fullmatch(r"udptun: error: another udptun daemon \(pid \d+\) uses /run/udptun; .*\n", refused.stderr)
    host.stop_daemon()
    lines = host.run([*CLEANUP, "--release"]).stdout.splitlines()
    assert [re.sub(r"\d+$", "N", line) for line in lines[:3]] == ["stopped datapath process N"] * 2 + [
        "deleted link flannelN"
    ]
    assert any(line.startswith("released the lease 10.244.") for line in lines)
    assert state() == before
    assert left_behind(host) == []
    assert host.run([*CLEANUP, "--release"]).stdout == ""


# --- starting beside or after another


def test_second_daemon_of_a_run_directory_ends_with_1_naming_the_first(host: Host) -> None:
    host.start_daemon()
    host.wait_ready()
    pid = host.path("/run/udptun/daemon.lock").read_text().strip()
    assert host.path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[3] == b"daemon"
    second = host.run(DAEMON, check=False)
    assert second.returncode == 1
    assert messages(second.stderr, "E") == [
        f"another udptun daemon (pid {pid}) uses /run/udptun; stop it, or give this one a --run-dir, --state-dir and "
        "--subnet-file of its own"
    ]
    assert read_status(host)["pid"] == int(pid)


def test_restart_that_fails_leaves_the_tunnel_forwarding(two_hosts: Lab) -> None:
    one, two = two_hosts.hosts
    before = datapath_pids(one)
    with udp_flow(two.pod(1), one.pod(1), 500) as flow:
        one.stop_daemon()
        one.path("/run/bad.json").write_text("{}")
        for argv, status in (
            (["--net-config-path=/run/bad.json"], 2),
            (["--subnet-file=/proc/none/subnet.env"], 1),
            (["--store=file:/run/none.json"], 2),
        ):
            failed = one.run([*DAEMON, *argv], check=False)
            assert failed.returncode == status
            assert len(messages(failed.stderr, "E")) == 1
            flow.wait_for_more()
        assert before == datapath_pids(one)
        one.start_daemon()
        one.wait_ready()
        flow.wait_for_more()
    assert flow.report.lost == []


def test_start_that_fails_keeps_what_holds_packets_back_when_an_earlier_run_left_it(host: Host) -> None:
    """With both processes dead, device and unreachable route keep packets from leaving in clear text."""
    host.start_daemon()
    host.wait_ready()
    assert host.daemon is not None
    host.daemon.kill()
    host.daemon.wait(10)
    kill(host, *datapath_pids(host))
    failed = host.run([*DAEMON, "--subnet-file=/proc/none/subnet.env"], check=False)
    assert failed.returncode == 1
    assert datapath_pids(host) == set()
    routes = host.run(["ip", "route", "show", "proto", "158"]).stdout
    assert "unreachable 10.244.0.0/16" in routes
    assert sql(host, "select key from leases") != ""


# --- reload


def test_reload_changes_the_number_of_workers_under_traffic_without_loss(
    pair: Lab, figure: Callable[..., None]
) -> None:
    one, two = pair.hosts
    with udp_flow(two.pod(1), one.pod(1), 1000) as inwards, udp_flow(one.pod(1), two.pod(1), 1000) as outwards:  # noqa: SIM117
        with tcp_flow(one.pod(1), two.pod(1)) as tcp:
            for n in (3, 1, 2):
                reload(one, {"Workers": n})
                inwards.wait_for_more()
                outwards.wait_for_more()
                assert read_status(one)["datapath"]["workers"] == ["running"] * n
    n_lost = len(inwards.report.lost) + len(outwards.report.lost)
    figure(f"of {inwards.report.sent + outwards.report.sent} packets over 3 reloads, lost", n_lost)
    assert n_lost == 0
    tcp.report.assert_exact()


def test_reload_changes_the_mtu_of_device_pods_and_peers(pair: Lab) -> None:
    one, two = pair.hosts
    log = reload(one, {"MTU": 1300})
    assert sum("config reloaded mtu=1272 workers=1 source_check=peer" in line for line in messages(log, "I")) == 1
    assert one.mtu == 1272
    assert read_status(one)["backend"]["mtu"] == 1272
    wait_until("flannel0 to get its MTU", lambda: mtu_of_device(one) == 1272, 10)
    ping(one, two.pod(1).address, "-M", "do", "-s", str(1272 - 28))
    # The pod's own link still has the old MTU: what is too large for the tunnel is told to it.
    too_large = ["ping", "-c", "1", "-M", "do", "-s", "1400", "-W", "5", str(two.pod(1).address)]
    told = one.pod(1).run(too_large, check=False)
    assert "Frag needed and DF set (mtu = 1272)" in told.stdout
    reload(one, {})
    wait_until("flannel0 to get its MTU back", lambda: mtu_of_device(one) == 1472, 10)
    ping(one, two.pod(1).address, "-M", "do", "-s", str(1472 - 28))


def test_reload_changes_who_may_send(pair: Lab) -> None:
    """A stranger's datagram, an echo for our tunnel address: refused under `peer`, taken under `off`."""
    one = pair.host(1)
    own = one.subnet.network_address
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 9, 1, 0, bytes([198, 51, 100, 1]), own.packed)
    header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
    echo = struct.pack("!BBHHH", 8, 0, 0xF7FF, 0, 0)
    script = (
        "import socket, sys; s = socket.socket(type=socket.SOCK_DGRAM);"
        f"s.sendto(bytes.fromhex(sys.argv[1]), ('{one.underlay_address}', 8285))"
    )

    def send() -> None:
        pair.switch.run([sys.executable, "-I", "-S", "-c", script, (header + echo).hex()])

    def counter(name: str) -> int:
        return int(read_status(one)["counters"][name])

    for check, name in (
        ("peer", "decap_drop_unknown_peer"),
        ("off", "decap_delivered"),
        ("PEER", "decap_drop_unknown_peer"),
    ):
        reload(one, {"SourceCheck": check})
        assert read_status(one)["backend"]["source_check"] == check.lower()
        before = counter(name)
        send()
        wait_until(f"{name} to count it", lambda name=name, before=before: counter(name) > before, 10)


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def test_reload_changes_how_much_is_logged(pair: Lab) -> None:
    one = pair.host(1)
    assert messages(reload(one, {"LogLevel": "Error"}), "I") == []
    assert messages(reload(one, "{}"), "E") != []
    assert any(line.startswith("config reloaded") for line in messages(reload(one, {"LogLevel": "debug"}), "I"))
    assert any(line.startswith("config reloaded") for line in messages(reload(one, {}), "I"))


def test_reload_changes_nothing_and_says_why_when_the_config_is_bad(pair: Lab) -> None:
    one = pair.host(1)

    def settings() -> Any:
        status = read_status(one)
        return status["backend"], status["datapath"]["workers"], status["datapath"]["pid"], one.subnet_env()

    before = settings()
    log = reload(one, {"Workers": 2, "MTU": 1300, "Port": 0, "LogLevel": 1})
    assert messages(log, "E") == [
        f"nothing reloaded: {NET_CONF}: Backend.Port: must be 1..65535, not 0",
        f'nothing reloaded: {NET_CONF}: Backend.LogLevel: must be "debug", "info", "warning" or "error", not 1',
    ]
    assert settings() == before
    log = reload(one, '{"Network": "192.168.0.0/16", "Backend": {"Type": "udp", "Workers": 2}}')
    (line,) = messages(log, "E")
    assert line.startswith("nothing reloaded: Network: 192.168.0.0/16 contains this host's underlay address")
    one.path(NET_CONF).rename(one.path("/run/udptun-lab/away"))
    assert one.daemon is not None
    before_log = len(one.daemon_log())
    one.daemon.send_signal(signal.SIGHUP)
    one.wait_ready()
    (line,) = messages(one.daemon_log()[before_log:], "E")
    assert line.startswith(f"nothing reloaded: no network config at {NET_CONF}: ")
    assert settings() == before


def test_reload_names_what_needs_a_restart_and_changes_the_rest(pair: Lab) -> None:
    one = pair.host(1)
    backend = {"Type": "udp", "Port": 9000, "SourceCheck": "strict"}
    log = reload(one, json.dumps({"Network": "10.240.0.0/12", "SubnetLen": 26, "Backend": backend}))
    prefix = "config changed, takes effect with the next start key="
    assert messages(log, "W") == [
        prefix + key for key in ("Network", "SubnetMin", "SubnetMax", "SubnetLen", "Backend.Port")
    ]
    status = read_status(one)
    assert (status["network"], status["lease"]["port"]) == ("10.244.0.0/16", 8285)
    assert status["backend"]["source_check"] == "strict"


def test_flags_of_this_host_win_over_the_config_also_after_a_reload(host: Host) -> None:
    host.start_daemon(["--mtu=1400", "--workers=2", "--source-check=off", "--offload-disabled=tso,udp_gro"])
    host.wait_ready()
    offloads = read_status(host)["backend"]["offloads"]
    assert {"tso", "udp_gro"}.isdisjoint(offloads)
    reload(host, {"MTU": 1300, "Workers": 1, "SourceCheck": "strict", "OffloadDisabled": ["udp_segment"]})
    status = read_status(host)
    assert (status["backend"]["mtu"], status["backend"]["source_check"]) == (1372, "off")
    assert status["backend"]["offloads"] == offloads
    assert status["datapath"]["workers"] == ["running", "running"]


# --- readiness


def test_service_manager_is_told_of_each_change(host: Host) -> None:
    path = "/run/manager.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(20)
        manager.bind(str(host.path(path)))
        daemon = host.popen(["env", f"NOTIFY_SOCKET={path}", *DAEMON], stderr=subprocess.DEVNULL)
        assert manager.recv(4096) == b"READY=1"
        assert host.path(SUBNET_ENV).exists()
        before_us = time.monotonic_ns() // 1000
        daemon.send_signal(signal.SIGHUP)
        reloading = re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=(\d+)", manager.recv(4096))
        assert reloading is not None
        assert before_us <= int(reloading[1]) <= time.monotonic_ns() // 1000
        assert manager.recv(4096) == b"READY=1"
        daemon.terminate()
        assert manager.recv(4096) == b"STOPPING=1"
        assert daemon.wait(10) == 0


def test_service_manager_that_is_gone_costs_one_line(host: Host) -> None:
    # Not a pipe: the datapath keeps it open when the daemon has ended.
    with host.path("/run/said").open("w") as said:
        daemon = host.popen(["env", "NOTIFY_SOCKET=/run/none.sock", *DAEMON], stderr=said)
    wait_until("the daemon", lambda: " ready subnet=" in host.path("/run/said").read_text(), 10)
    daemon.terminate()
    assert daemon.wait(10) == 0
    lines = messages(host.path("/run/said").read_text(), "W")
    assert [line for line in lines if "state=READY=1" in line] == [
        "cannot tell the service manager state=READY=1 error=[Errno 2] No such file or directory"
    ]


def test_daemon_is_alive_but_not_ready_while_it_waits_for_its_store(host: Host) -> None:
    host.start_daemon(["--healthz-port=9000"])
    host.wait_ready()
    assert get(host, "/metrics", 9000)[0] == 200
    host.stop_daemon()
    host.run([*CLEANUP, "--release"])
    with locked_database(host, "exclusive"):
        host.start_daemon(["--healthz-port=9000", "--metrics=false"])
        wait_until("the daemon to be alive", lambda: answers(host, 9000), 10)
        assert get(host, "/healthz", 9000) == (200, "flanneld is running")
        wait_until("the tunnel's device", host.path("/sys/class/net/flannel0").exists, 10)
        assert get(host, "/readyz", 9000) == (503, "flanneld is not ready yet")
        assert get(host, "/status", 9000)[0] == 404
        assert not host.path(SUBNET_ENV).exists()
        asked = host.run([*UDPTUN, "status"], check=False)
        assert (asked.returncode, asked.stdout) == (1, "")
        line = r"udptun: error: the daemon is not ready yet: waits for its lease in local:\S+(: .+)? \(for \d+ s\)\n"
        assert re.fullmatch(line, asked.stderr)
    host.wait_ready()
    assert get(host, "/readyz", 9000) == (200, "flanneld is ready")
    assert get(host, "/nothing", 9000)[0] == 404
    assert get(host, "/metrics", 9000)[0] == 404
    assert host.run(["curl", "-sf", "--unix-socket", "/run/udptun/udptun.sock", "http://u/metrics"]).stdout != ""


def test_idle_clients_never_take_health_and_status_away(host: Host) -> None:
    """64 connections that say nothing, on the health port or the status socket, and every other got no answer."""
    host.start_daemon(["--healthz-port=9000"])
    host.wait_ready()
    hold = (
        "import signal, socket\n"
        "held = [socket.create_connection(('127.0.0.1', 9000)) for _ in range(100)]\n"
        "for _ in range(100):\n"
        "    held.append(socket.socket(socket.AF_UNIX)); held[-1].connect('/run/udptun/udptun.sock')\n"
        "print('held', flush=True); signal.pause()\n"
    )
    idle = host.popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert idle.stdout is not None
        assert idle.stdout.readline() == "held\n"
        assert get(host, "/healthz", 9000) == (200, "flanneld is running")
        assert read_status(host)["lease"]["subnet"] == str(host.subnet)
    finally:
        idle.kill()
        idle.wait()


def answers(host: Host, port: int) -> bool:
    try:
        return get(host, "/healthz", port)[0] == 200
    except OSError:
        return False


def test_daemon_ends_within_a_second_while_it_waits_for_its_store(host: Host, slack: int) -> None:
    """SQLite's own waiting for a lock, 10 s, held up the end."""
    host.start_daemon()
    host.wait_ready()
    host.stop_daemon()
    host.run([*CLEANUP, "--release"])
    with locked_database(host, "exclusive"):
        host.start_daemon()
        wait_until("the tunnel's device", host.path("/sys/class/net/flannel0").exists, 10)
        start = time.monotonic()
        assert host.stop_daemon() == 0
        assert time.monotonic() - start < 1 * slack
    assert left_behind(host) == []


# --- what it writes


def test_subnet_env_is_flannels_byte_for_byte_and_the_subnet_is_kept(host: Host) -> None:
    host.start_daemon()
    host.wait_ready()
    own = host.subnet
    wanted = f"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={own[1]}/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    assert host.path(SUBNET_ENV).read_text() == wanted
    assert f"inet {own[0]}/32 " in host.run(["ip", "addr", "show", "flannel0"]).stdout
    host.stop_daemon()
    # The store has forgotten us: what subnet.env says decides.
    sql(host, "delete from leases")
    host.start_daemon()
    host.wait_ready()
    assert host.path(SUBNET_ENV).read_text() == wanted
    assert sql(host, "select key from leases") == f"{own[0]}-24\n"


def test_dockers_options_in_subnet_env_stay_when_the_mtu_changes_and_the_subnet_is_kept(host: Host) -> None:
    """Units of old write them there.  flannel's script left no subnet in the file; a new MTU took Docker's options."""
    host.start_daemon()
    host.wait_ready()
    own = host.subnet
    host.run([*UDPTUN, "docker-opts", "-f", SUBNET_ENV, "-d", SUBNET_ENV, "-c"])
    options = f'DOCKER_OPTS=" --bip={own[1]}/24 --ip-masq=true --mtu=1472"\n'
    assert host.path(SUBNET_ENV).read_text().endswith(f"FLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n{options}")
    reload(host, {"MTU": 1400})
    assert host.path(SUBNET_ENV).read_text().endswith(f"FLANNEL_MTU=1372\nFLANNEL_IPMASQ=false\n{options}")
    host.stop_daemon()
    sql(host, "delete from leases")
    host.start_daemon()
    host.wait_ready()
    assert host.subnet == own
    assert "DOCKER_OPTS" not in host.path(SUBNET_ENV).read_text()


def test_docker_opts_name_a_route_that_takes_the_containers_packets_away(host: Host) -> None:
    """flannel's script ends with status 1 then, too, after it has written the options."""
    host.start_daemon()
    host.wait_ready()
    own, gateway = host.subnet, host.underlay_address + 7
    command = [*UDPTUN, "docker-opts", "-f", SUBNET_ENV, "-d", "/dev/stdout", "-i"]
    # One of another length, one without a gateway: neither is the subnet's through a gateway.
    host.run(["ip", "route", "add", f"{own[0]}/25", "via", str(gateway)])
    host.run(["ip", "route", "add", str(own), "dev", "eth0"])
    assert f'--bip={own[1]}/24"' in host.run(command).stdout
    host.run(["ip", "route", "replace", str(own), "via", str(gateway)])
    done = host.run(command, check=False)
    assert done.returncode == 1
    assert f'--bip={own[1]}/24"' in done.stdout
    assert f"there is a route to {own} via {gateway} dev eth0, so Docker's containers" in done.stderr


def test_a_reservation_for_a_host_with_another_lease_outlives_its_restart_and_is_taken_after_cleanup(
    host: Host,
) -> None:
    """The restart deleted it without a word, and so it was never taken."""
    host.start_daemon()
    host.wait_ready()
    own = host.subnet
    reserved = "10.244.200.0/24"  # not one that may be chosen

    def lease(*words: str) -> str:
        store = ["--net-config-path", str(NET_CONF), "--store", f"local:{LEASES}"]
        return host.run([*UDPTUN, "lease", *words, *store]).stdout

    said = lease("reserve", reserved, "--public-ip", str(host.underlay_address))
    assert f"until then the host goes on with {own}, of which its pods may have addresses" in said
    host.stop_daemon()
    host.start_daemon()
    host.wait_ready()
    assert host.subnet == own
    left = f"{reserved} is reserved for this host and is not taken: pods may have addresses of {own}"
    assert any(line.startswith(left) for line in messages(host.daemon_log(), "W"))
    assert f"{reserved} " in lease("list")
    host.stop_daemon()
    host.run(CLEANUP)
    host.start_daemon()
    host.wait_ready()
    assert str(host.subnet) == reserved
    assert f"lease given up subnet={own} instead={reserved}" in host.daemon_log()
    assert sql(host, "select key, expires from leases") == "10.244.200.0-24 None\n"
    host.stop_daemon()
    done = host.run([*CLEANUP, "--release"]).stdout
    assert f"left the reservation {reserved} in local:{LEASES}; `udptun lease release` deletes it\n" in done
    assert f"{reserved} " in lease("list")


def test_previous_subnet_is_left_to_its_new_holder(host: Host) -> None:
    host.start_daemon()
    host.wait_ready()
    own = host.subnet
    host.stop_daemon()
    value = json.dumps({"PublicIP": "192.168.77.99"})
    sql(host, f"delete from leases; -- {own}")
    sql(host, f"insert into leases (key, value) values ('{own[0]}-24', '{value}')")
    host.start_daemon()
    host.wait_ready()
    assert host.subnet != own
    assert {peer["subnet"] for peer in read_status(host)["peers"]} == {str(own)}


def test_ipv6_is_named_in_lease_and_subnet_env_and_its_network_leads_into_the_device(host: Host) -> None:
    """Also where the host itself has no IPv6 address: the datagrams are those of IPv4."""
    ipv6 = {"Network": "10.244.0.0/16", "EnableIPv6": True, "IPv6Network": "fd00:244::/48"}
    host.path(NET_CONF).write_text(json.dumps(ipv6))
    host.start_daemon()
    host.wait_ready()
    text = host.path(SUBNET_ENV).read_text()
    match = re.fullmatch(
        r"FLANNEL_NETWORK=10\.244\.0\.0/16\nFLANNEL_SUBNET=10\.244\.(\d+)\.1/24\n"
        r"FLANNEL_IPV6_NETWORK=fd00:244::/48\nFLANNEL_IPV6_SUBNET=(fd00:244:[0-9a-f:]*)1/64\n"
        r"FLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n",
        text,
    )
    assert match is not None, text
    assert sql(host, "select key from leases") == f"10.244.{match[1]}.0-24&{match[2]}-64\n"
    assert '"PublicIPv6":null,' in sql(host, "select value from leases")
    (address,) = host.run(["ip", "-6", "-o", "addr", "show", "dev", "flannel0"]).stdout.splitlines()
    assert address.split()[3] == f"{match[2]}/128"
    routes = host.run(["ip", "-6", "route", "show", "dev", "flannel0", "proto", "158"]).stdout.splitlines()
    assert [route.split()[0] for route in routes] == ["fd00:244::/48"]


# --- what it says about the world


def test_foreign_route_to_the_network_is_reported_until_it_goes(host: Host) -> None:
    host.run(["ip", "route", "add", "10.244.0.0/16", "via", "192.168.77.1"])
    host.start_daemon()
    host.wait_ready()
    (problem,) = read_status(host)["problems"]
    assert problem.startswith("route 10.244.0.0/16 via 192.168.77.1 dev eth0 proto 3 is not ours; it takes the traffic")
    assert any("is not ours" in line for line in messages(host.daemon_log(), "W"))
    assert f"problem    {problem}" in host.run([*UDPTUN, "status"]).stdout
    host.run(["ip", "route", "del", "10.244.0.0/16", "via", "192.168.77.1"])
    wait_until("the problem to be over", lambda: read_status(host)["problems"] == [], 20)
    assert "dev flannel0 proto 158" in host.run(["ip", "route", "show", "10.244.0.0/16"]).stdout


def test_own_lease_that_somebody_deletes_is_taken_again(host: Host) -> None:
    host.start_daemon()
    host.wait_ready()
    key = sql(host, "select key from leases")
    sql(host, "delete from leases")
    wait_until("the lease to be back", lambda: sql(host, "select key from leases") == key, 10)
    wait_until("the daemon to say so", lambda: "lease taken again subnet=" in host.daemon_log(), 10)
    assert read_status(host)["problems"] == []


def test_two_nodes_with_one_public_ip_and_port_are_told_of_each_other(host: Host) -> None:
    """The later one takes the lease over, as flannel's does, and leaves it alone when the first shows that it lives."""
    host.start_daemon()
    host.wait_ready()
    first = read_status(host)["lease"]["node_id"]
    other = host.lab.add_host()
    other.start_daemon(["--iface=eth0", f"--public-ip={host.underlay_address}"])
    other.wait_ready()
    second = read_status(other)["lease"]["node_id"]
    (warning,) = messages(other.daemon_log(), "W")
    address = f"{host.underlay_address}:8285"
    assert f"it was {address} (node {first}), we are {address} (node {second});" in warning
    assert other.subnet == host.subnet
    wait_until("the first to show that it is alive", lambda: read_status(other)["problems"] != [], 10)
    (problem,) = read_status(other)["problems"]
    assert f"{host.subnet}, which we took over, is {address} (node {first})'s again" in problem
    assert read_status(host)["problems"] == []
    (said,) = messages(host.daemon_log(), "W")
    assert f"by {address} (node {second}), from {address} (node {first})" in said
    assert len(messages(other.daemon_log(), "E")) == 1
    assert messages(host.daemon_log(), "E") == []


def test_store_that_cannot_be_used_for_a_while_costs_one_line_and_no_packet(two_hosts: Lab) -> None:
    one, two = two_hosts.hosts
    # A directory in the database's place: nobody can open it, and both hosts share it.
    with udp_flow(one.pod(1), two.pod(1), 500) as flow:
        one.path(LEASES).rename(one.path(LEASES.with_suffix(".away")))
        one.path(LEASES).mkdir()
        wait_until("the problem", lambda: read_status(one)["problems"] != [], 10)
        flow.wait_for_more(1000)
        one.path(LEASES).rmdir()
        one.path(LEASES.with_suffix(".away")).rename(one.path(LEASES))
        sql(one, "insert into leases (key, value) values ('10.244.0.0-24', '{\"PublicIP\":\"192.168.77.99\"}')")
        wait_until("the problem to be over", lambda: read_status(one)["problems"] == [], 20)
    assert flow.report.lost == []
    log = one.daemon_log()
    (line,) = (line for line in messages(log, "W") if line.startswith("lease store unavailable"))
    assert "it is not a regular file" in line
    (line,) = (line for line in messages(log, "I") if line.startswith("lease store answers again"))
    assert line.startswith(f"lease store answers again store=local:{LEASES} after_s=")


# --- the other commands


def test_leases_file_from_the_starter_serves_and_a_change_of_our_own_entry_is_an_error() -> None:
    path = "/run/leases.json"
    with Lab(f"f{os.getpid()}", store=f"file:{path}") as lab:
        one, two = lab.hosts
        one.run([*UDPTUN, "lease", "init", path])
        again = one.run([*UDPTUN, "lease", "init", path], check=False)
        assert (again.returncode, again.stderr) == (
            2,
            f"udptun: error: {path} exists already and was left as it is; edit it, or name another file\n",
        )
        starter = one.path(path).read_text()
        good = starter.replace("192.0.2.1", "192.168.77.11").replace("192.0.2.2", "192.168.77.12")
        for host in lab.hosts:
            host.path(path).write_text(good)
        lab.start()
        wait_for_peers(lab)
        ping(one.pod(1), two.pod(1).address)
        with udp_flow(two.pod(1), one.pod(1), 200) as flow:
            one.path(path).write_text(good.replace("192.168.77.11", "192.168.77.13"))
            wait_until("the error", lambda: read_status(one)["problems"] != [], 10)
            flow.wait_for_more(50)
            one.path(path).write_text(good)
            wait_until("it to be over", lambda: read_status(one)["problems"] == [], 10)
        assert flow.report.lost == []
        (line,) = messages(one.daemon_log(), "E")
        assert "has no usable entry with PublicIP 192.168.77.11: add one" in line


def test_flanneld_is_the_daemon_with_flannels_flags(host: Host) -> None:
    asked = host.run([*FLANNELD, "-version"])
    assert (asked.stdout, asked.stderr.split()[0]) == ("", "udptun")
    argv = [*FLANNELD, "-store", f"local:{LEASES}", "-net-config-path", str(NET_CONF), "-iface=eth0", "-v=1"]
    host.start_daemon(command=argv)
    host.wait_ready()
    assert host.stop_daemon() == 0
    assert messages(host.daemon_log(), "D") != []


def test_status_without_a_daemon_is_one_line_and_status_1(host: Host) -> None:
    for argv in ([], ["--json"], ["--run-dir=/run/other"]):
        asked = host.run([*UDPTUN, "status", *argv], check=False)
        directory = "/run/other" if argv == ["--run-dir=/run/other"] else "/run/udptun"
        assert (asked.returncode, asked.stdout) == (1, "")
        assert asked.stderr == (
            f"udptun: error: no udptun daemon answers at {directory}/udptun.sock: No such file or directory; "
            "is it running, and with this --run-dir?\n"
        )
    host.start_daemon()
    host.wait_ready()
    host.stop_daemon()
    asked = host.run([*UDPTUN, "status"], check=False)
    assert asked.returncode == 1
    assert "Connection refused" in asked.stderr or "No such file" in asked.stderr


def keys_of(document: Any, path: str = "") -> set[str]:
    """Every key as a path; the members of a list have `[]`."""
    if isinstance(document, dict):
        found = {f"{path}.{key}".lstrip(".") for key in document}
        return found.union(*(keys_of(value, f"{path}.{key}".lstrip(".")) for key, value in document.items()))
    if isinstance(document, list):
        return set().union(*(keys_of(value, f"{path}[]") for value in document))
    return set()


def test_status_has_schema_1_and_exactly_the_documented_keys(two_hosts: Lab) -> None:
    one, two = two_hosts.hosts
    ping(one.pod(1), two.pod(1).address)
    # For the keys of such a host.
    value = json.dumps({"PublicIP": "192.168.77.200", "BackendType": "vxlan"})
    sql(one, f"insert into leases (key, value) values ('10.244.200.0-24', '{value}')")
    wait_until("the other host", lambda: len(read_status(one)["peers"]) == 2, 10)
    wait_until_counted(one, two)
    text = one.run([*UDPTUN, "status", "--json"]).stdout
    status = json.loads(text)
    assert status["schema"] == 1
    documented = set(re.findall(r"^\| `([a-z0-9_.\[\]]+)` \|", DOCUMENTATION.read_text(), re.MULTILINE))
    # Of a host with both families, and of one with the shortcut: test_dual_stack.py and test_shortcut_detour.py.
    by_shortcut = "datapath.shortcut_detour."
    documented -= {key for key in documented if key.startswith(("ipv6.", by_shortcut))}
    by_name = ("counters.", "datapath.worker_counters[].", "datapath.shortcut_passed.", by_shortcut)
    assert {key for key in keys_of(status) if not key.startswith(by_name)} == documented
    (worker,) = status["datapath"]["worker_counters"]
    # Read a moment before the sums: a packet may have come in between.
    assert all(0 < n <= status["counters"][name] for name, n in worker.items())
    assert status["counters"]["encap_packets"] >= 2
    peer, _ = status["peers"]
    assert (peer["subnet"], peer["public_ip"], peer["port"], peer["udptun"]) == (
        str(two.subnet),
        str(two.underlay_address),
        8285,
        True,
    )
    assert peer["encap_packets"] >= 2
    assert peer["decap_bytes"] >= 2 * 84
    assert status["lease"]["subnet"] == str(one.subnet)
    assert one.path(f"/proc/{status['datapath']['pid']}").exists()
    shown = one.run([*UDPTUN, "status"]).stdout
    measured = r"(alive|unknown) +([\d.]+|-) +(\d+|-)"
    row = rf"^{two.subnet} +{two.underlay_address}:8285 +{measured}( +[\d.]+( k)?){{4}}( +[\d.]+ k?B){{2}}  udptun$"
    assert re.search(row, shown, re.MULTILINE)

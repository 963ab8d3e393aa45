"""`./dev demo`, `./dev bench` and the micro-benchmark as a user runs them, with short streams."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import paths
from bench.compiler import missing_compiler
from bench.cpu import SESSION_MARK, Meter, Usage, foreign_pids
from bench.demo import Figures, comparison
from bench.errors import BenchError
from bench.figures import TUNNEL
from bench.measure import Ping, Result, ping, wait_for_path
from udptun.core.family import Family
from udptun.lab.comparison import Way
from udptun.lab.errors import LabError
from udptun.lab.host import UNDERLAY
from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]
VXLAN_LINE = r"kernel vxlan +(1450 .*|this kernel has no vxlan)"
NOTHING_IS_LEFT = "nothing is left: no process, network namespace, link, mount or file of the lab"


def start(module: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    with start(module, *arguments, **environment) as child:
        out, err = child.communicate(timeout=90)
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def test_demo_shows_leases_routes_pings_and_the_table_and_leaves_nothing(
    processes_with: Callable[[str, str], dict[int, str]],
) -> None:
    mark = str(time.time_ns())
    demo = run("bench.demo", "--seconds", "1", "--rounds", "1", UDPTUN_TEST_DEMO=mark)
    assert (demo.returncode, demo.stderr) == (0, "")
    for line in (
        r"lease +10\.244\.\d+\.0/24 of 10\.244\.0\.0/16, expires in .*",
        r"underlay +eth0 192\.168\.77\.11, .*:8285",
        r"10\.244\.\d+\.0/24 +192\.168\.77\.12:8285 +(alive|unknown) .*",
        r"10\.244\.0\.0/16 dev flannel0 .*",
        r"unreachable 10\.244\.0\.0/16 .*",
        r"udptun +1472 +\d+\.\d\d +\d+% .*",
        r"plain routing +1500 +\d+\.\d\d +100% .*",
        VXLAN_LINE,
        r"h2 +[\d,]{3,} +[\d,]{3,} +[\d,]{5,} +[\d,]{5,} +\d+",
    ):
        assert re.search(rf"^    {line}$", demo.stdout, re.MULTILINE), line
    assert demo.stdout.count("3 packets transmitted, 3 received, 0% packet loss") == 2
    assert demo.stdout.splitlines()[-1].endswith(NOTHING_IS_LEFT)
    assert "\033" not in demo.stdout
    assert [line for line in demo.stdout.splitlines() if len(line) > 100] == []
    assert not processes_with("UDPTUN_TEST_DEMO", mark)


@pytest.mark.parametrize("moment", ["making a switch", "starting `udptun daemon`", "both have a lease", "round 1"])
def test_demo_leaves_nothing_and_exits_with_130_when_interrupted(
    moment: str, processes_with: Callable[[str, str], dict[int, str]]
) -> None:
    mark = str(time.time_ns())
    with start("bench.demo", "--seconds", "5", UDPTUN_TEST_DEMO=mark) as demo:
        assert demo.stdout is not None
        said = ""
        while moment not in said:
            # Not by lines: what is in progress has an open one.
            more = os.read(demo.stdout.fileno(), 4096).decode()
            assert more, said
            said += more
        # As a terminal does: to the whole foreground process group.
        os.killpg(demo.pid, signal.SIGINT)
        out, err = demo.communicate(timeout=30)
    assert (demo.returncode, err) == (130, "")
    assert "interrupted; the lab is removed" in out
    assert NOTHING_IS_LEFT in out
    assert not processes_with("UDPTUN_TEST_DEMO", mark)


def test_nothing_is_left_when_the_demo_is_killed(processes_with: Callable[[str, str], dict[int, str]]) -> None:
    mark = str(time.time_ns())
    with start("bench.demo", "--seconds", "5", UDPTUN_TEST_DEMO=mark) as demo:
        assert demo.stdout is not None
        while "both have a lease" not in demo.stdout.readline():
            assert demo.poll() is None
        demo.kill()
    wait_until("nothing to be left", lambda: not processes_with("UDPTUN_TEST_DEMO", mark), 10)


def test_demo_names_what_it_needs_when_a_command_is_missing(tmp_path: Path) -> None:
    demo = run("bench.demo", PATH=str(tmp_path))
    assert demo.returncode == 1
    assert demo.stderr.startswith("error: the demo needs the command ip and ")
    assert demo.stderr.count("\n") == 1


def test_demo_refuses_seconds_that_are_none() -> None:
    demo = run("bench.demo", "--seconds", "0")
    assert demo.returncode == 2
    assert "'0' is not a whole number from 1 to 60" in demo.stderr


def test_lost_ping_is_an_error_that_names_both_pods(two_hosts: Lab) -> None:
    one, two = two_hosts.host(1).pod(1), two_hosts.host(2).pod(1)
    tunnel = paths.Path(TUNNEL, two_hosts.host(1).mtu, one, two, two.address)
    assert len(ping(tunnel, 2, 0.05).rtt_ms) == 2
    nobody = dataclasses.replace(tunnel, address=two.address + 1)
    with pytest.raises(BenchError, match=r"1 of 1 pings from h1/p1 to h2/p1 at 10\.244\.\d+\.3 over udptun were lost"):
        ping(nobody, 1, 1)


def test_a_measurement_begins_when_the_other_host_has_heard_of_this_one(two_hosts: Lab) -> None:
    """A first echo that came too soon ended the demo with an error."""
    one, two = two_hosts.host(1).pod(1), two_hosts.host(2).pod(1)
    host = two_hosts.host(2)
    path = paths.Path(TUNNEL, two_hosts.host(1).mtu, one, two, two.address)
    host.run(["ip", "link", "set", "eth0", "down"])
    later = host.popen(["sh", "-c", f"sleep 2; ip link set eth0 up; ip route replace default via {UNDERLAY[1]}"])
    wait_for_path(path)
    assert later.wait(10) == 0
    assert len(ping(path, 3, 0.05).rtt_ms) == 3


def test_table_says_so_and_goes_on_when_the_kernel_has_no_vxlan(
    two_hosts: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = "Error: Unknown device type."

    def no_vxlan(lab: Lab, family: Family) -> Way:
        raise LabError(f"no kernel vxlan to compare with: cannot set up the network of h1: {answer}")

    monkeypatch.setattr(paths, "kernel_vxlan", no_vxlan)
    connected = paths.connect(two_hosts)
    usage = Usage(1.0, 1.0, 0.0, 0.0)
    tcp = Result({"gbit_per_s": 2.0, "retransmits": 0}, usage)
    udp = Result({"kpackets_per_s": 1.0, "lost": 0.0}, usage)
    figures = Figures(Ping((0.5,), ""), tcp, udp)
    lines = comparison(connected, [{path.name: figures for path in connected.present}])
    assert [line.split("  ")[0] for line in lines[1:]] == ["udptun", "plain routing", "kernel vxlan"]
    assert lines[1].split()[1:5] == ["1472", "2.00", "100%", "-"]
    assert lines[3] == "kernel vxlan   this kernel has no vxlan"
    assert ping(connected.present[1], 1, 1).rtt_ms

    answer = "RTNETLINK answers: File exists"
    monkeypatch.setattr(paths, "plain_routing", lambda lab, family: Way("plain", two_hosts.host(1).subnet, 1500))
    with pytest.raises(LabError, match="File exists"):
        paths.connect(two_hosts)


def test_bench_of_all_that_we_ship_writes_every_run_and_a_report(
    tmp_path: Path, processes_with: Callable[[str, str], dict[int, str]]
) -> None:
    """What needs programs of others is named as left out, or measured where they are installed."""
    if reason := missing_compiler():
        pytest.skip(f"the bench {reason}")
    file, mark = tmp_path / "result.json", str(time.time_ns())
    words = ["--modes", "B", "--paths", "udptun,naive,pytun,underlay,flanneld"]
    words += ["--workloads", "tcp_1,udp_64,rtt,memory"]
    numbers = ["--repeats", "1", "--seconds", "1", "--json", str(file)]
    bench = run("bench", *words, *numbers, UDPTUN_TEST_DEMO=mark)
    # Names the runs that failed.
    print(bench.stdout)
    assert (bench.returncode, bench.stderr) == (0, "")
    assert NOTHING_IS_LEFT in bench.stdout
    document: dict[str, Any] = json.loads(file.read_text())
    assert document["schema"] == 3
    assert document["machine"].keys() >= {"commit", "kernel", "cpu", "cores"}
    assert document["machine"]["cores"] == os.cpu_count()
    assert document["command"] == ["python", "-m", "bench", *words, *numbers]
    measured = ["udptun", "naive loop", "pytun loop", "underlay"]
    assert [path["name"] for path in document["paths"]] == measured
    assert document["missing"] == {"flanneld": "give its program with --flanneld"}
    runs = {(one["workload"], one["path"]): one for one in document["runs"]}
    assert len(document["runs"]) == 4 * 3 + 3
    assert {*runs["tcp_1", "underlay"]} == {"round", "mode", "workload", "path", "figures", "usage"}
    assert [one for one in document["runs"] if "error" in one] == []
    for name in measured:
        stream, flood, trips = (runs[workload, name] for workload in ("tcp_1", "udp_64", "rtt"))
        assert stream["figures"]["gbit_per_s"] > 0
        assert flood["figures"]["kpackets_per_s"] > 0
        assert 0 <= flood["figures"]["lost"] < 1
        assert 0 < trips["figures"]["p50_us"] <= trips["figures"]["p99_us"] <= trips["figures"]["p99_9_us"]
        assert ("tunnel_cpu_s_per_gb" in stream["figures"]) == (name != "underlay")
    for name in measured[:-1]:
        # A loop that carries packets works for it, and uses memory.
        assert runs["tcp_1", name]["usage"]["tunnel_s"] > 0
        assert runs["memory", name]["figures"]["memory_mib"] > 0
    assert runs["memory", "udptun"]["figures"].keys() >= {"daemon_mib", "datapath_mib"}
    beside = ["result.md", *(f"result-{plot}.svg" for plot in ("tcp", "cpu", "udp", "rtt"))]
    assert {path.name for path in tmp_path.iterdir()} >= {file.name, *beside}
    assert not processes_with("UDPTUN_TEST_DEMO", mark)
    assert "## Goals" in bench.stdout


@pytest.mark.parametrize(("key", "mtu"), [("naive", 1472), ("pytun", 1472), ("fastd", 1471), ("openvpn", 1472)])
def test_peer_tunnel_carries_full_packets_between_pods_both_ways(
    key: str, mtu: int, two_hosts: Lab, tmp_path: Path
) -> None:
    connected = paths.connect(two_hosts, [key], paths.Tools(tmp_path, None))
    if not connected.present:
        pytest.skip("; ".join(connected.missing.values()))
    (path,) = connected.present
    assert path.mtu == mtu
    # One hop less on each host, and one at each end of the tunnel: the same as flannel's.
    hops = 4 if key in ("naive", "pytun") else 2
    one_ping = ["ping", "-c", "1", "-W", "1", "-M", "do"]
    # The way back is the other host's address in the same network: 10.x.<host>.<pod>.
    back = path.address - 256
    for client, address in ((path.client, path.address), (path.server, back)):
        echo = client.run([*one_ping, "-s", str(mtu - 28), str(address)]).stdout
        assert f"ttl={64 - hops} " in echo
        assert client.run([*one_ping, "-s", str(mtu - 27), str(address)], check=False).returncode == 1
    assert len(path.pids) == 2
    for process in path.processes:
        assert Path(f"/proc/{process.pid}/cmdline").read_bytes()


def test_peer_tunnel_that_cannot_start_is_left_out_with_its_last_words(two_hosts: Lab, tmp_path: Path) -> None:
    if reason := missing_compiler():
        pytest.skip(reason)
    blocker = "import socket, sys; s = socket.socket(2, 2); s.bind(('', 8286)); print('bound', flush=True); input()"
    holder = two_hosts.host(2).popen([sys.executable, "-c", blocker], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "bound\n"
        connected = paths.connect(two_hosts, ["naive"], paths.Tools(tmp_path, None))
        holder.kill()
    assert connected.present == ()
    (reason,) = connected.missing.values()
    assert reason.endswith("Address already in use")


@pytest.mark.parametrize("is_foreign", [True, False])
def test_cpu_time_of_a_process_is_foreign_when_no_bench_started_it(
    is_foreign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_foreign:
        monkeypatch.delenv(SESSION_MARK, raising=False)
    else:
        monkeypatch.setenv(SESSION_MARK, "1")
    environment = dict(os.environ)
    monkeypatch.setenv(SESSION_MARK, "1")
    code = "import time; print(flush=True); input()\nwhile time.process_time() < 0.6: pass\nprint(flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdout.readline()
        meter = Meter([program.pid])
        program.stdin.write("go on\n")
        program.stdin.flush()
        program.stdout.readline()
        usage = meter.read()
        assert (program.pid in foreign_pids()) == is_foreign
        program.kill()
    assert usage.tunnel_s > 0.2
    if is_foreign:
        assert usage.foreign_cores * usage.wall_s > 0.2
    else:
        # Whatever others do at the time is not in here.
        assert usage.system_s > 0.2


def test_zombie_of_a_foreign_process_is_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, a zombie was nobody's: a run in which its parent waited for it was called disturbed by 598 cores."""
    code = (
        "import os\nif os.fork() == 0: os._exit(0)\n"
        "os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)\nprint(flush=True)\ninput()"
    )
    for is_foreign in (True, False):
        monkeypatch.setenv(SESSION_MARK, "another" if is_foreign else "1")
        environment = dict(os.environ)
        monkeypatch.setenv(SESSION_MARK, "1")
        with subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as parent:
            assert parent.stdout is not None
            parent.stdout.readline()
            (zombie,) = map(int, Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
            assert {parent.pid, zombie} & foreign_pids() == ({parent.pid, zombie} if is_foreign else set())
            parent.kill()


def test_bench_refuses_words_it_does_not_know() -> None:
    bench = run("bench", "--paths", "udptun,carrier-pigeon")
    assert bench.returncode == 2
    assert "'carrier-pigeon' is none of udptun, host-gw" in bench.stderr


def test_bench_refuses_a_file_it_cannot_write_before_it_measures() -> None:
    bench = run("bench", "--json", "/nonexistent/result.json")
    assert bench.returncode == 1
    assert bench.stderr == (
        "error: cannot write /nonexistent/result.json: No such file or directory; name another file\n"
    )
    assert "round" not in bench.stdout


def test_micro_benchmarks_check_what_they_measure_and_print_a_line_for_every_case() -> None:
    if reason := missing_compiler():
        pytest.skip(reason)
    figure = r" +[\d.]+ \([\d.]+ to [\d.]+\)"
    checksum = run("bench.micro.checksum", "--repeats", "1")
    assert (checksum.returncode, checksum.stderr) == (0, "")
    for n in ("20", "92", "1,472", "65,535"):
        assert re.search(rf"^{n}{figure} +[\d.]+$", checksum.stdout, re.MULTILINE), checksum.stdout
    turn = run("bench.micro.turn", "--repeats", "1")
    assert (turn.returncode, turn.stderr) == (0, "")
    for case in ("encap UDP 64, 64 at once", "decap UDP 1444, 1 at once", "decap TCP, 45 segments at once"):
        assert re.search(rf"^{case}{figure}$", turn.stdout, re.MULTILINE), turn.stdout


def test_lookup_benchmark_checks_its_answers_and_prints_a_line_for_every_size() -> None:
    lookup = run("bench.micro.lookup", "--repeats", "2")
    assert (lookup.returncode, lookup.stderr) == (0, "")
    figure = r" +\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)"
    for family in ("IPv4", "IPv6"):
        for n in ("1", "1,000", "65,534"):
            assert re.search(rf"^{family} +{n}{figure}{figure}$", lookup.stdout, re.MULTILINE), lookup.stdout

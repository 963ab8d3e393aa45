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
from bench.demo import Figures, comparison
from bench.measure import BenchError, Ping, Tcp, UdpFlood, ping
from udptun.lab.comparison import Way
from udptun.lab.errors import LabError
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
        r"10\.244\.\d+\.0/24 +192\.168\.77\.12 +8285 +yes .*",
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
    tunnel = paths.Path(paths.TUNNEL, two_hosts.host(1).mtu, one, two, two.address)
    assert len(ping(tunnel, 2, 0.05).rtt_ms) == 2
    nobody = dataclasses.replace(tunnel, address=two.address + 1)
    with pytest.raises(BenchError, match=r"1 of 1 pings from h1/p1 to h2/p1 at 10\.244\.\d+\.3 over udptun were lost"):
        ping(nobody, 1, 1)


def test_table_says_so_and_goes_on_when_the_kernel_has_no_vxlan(
    two_hosts: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = "Error: Unknown device type."

    def no_vxlan(lab: Lab) -> Way:
        raise LabError(f"no kernel vxlan to compare with: cannot set up the network of h1: {answer}")

    monkeypatch.setattr(paths, "kernel_vxlan", no_vxlan)
    connected = paths.connect(two_hosts)
    figures = Figures(Ping((0.5,), ""), Tcp((), 2.0, 0, 1.0, {}), UdpFlood((), 1000.0, 0.0, 1.0, {}))
    lines = comparison(connected, [{path.name: figures for path in connected.present}])
    assert [line.split("  ")[0] for line in lines[1:]] == ["udptun", "plain routing", "kernel vxlan"]
    assert lines[1].split()[1:5] == ["1472", "2.00", "100%", "-"]
    assert lines[3] == "kernel vxlan   this kernel has no vxlan"
    assert ping(connected.present[1], 1, 1).rtt_ms

    answer = "RTNETLINK answers: File exists"
    monkeypatch.setattr(paths, "plain_routing", lambda lab: Way("plain", two_hosts.host(1).subnet, 1500))
    with pytest.raises(LabError, match="File exists"):
        paths.connect(two_hosts)


def test_bench_writes_json_with_machine_command_and_every_raw_run(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    bench = run("bench", "--repeats", "1", "--seconds", "1", "--json", str(file))
    assert (bench.returncode, bench.stderr) == (0, "")
    assert re.search(rf"^    {VXLAN_LINE}$", bench.stdout, re.MULTILINE)
    assert NOTHING_IS_LEFT in bench.stdout
    document: dict[str, Any] = json.loads(file.read_text())
    assert document["schema"] == 1
    assert document["machine"].keys() >= {"commit", "kernel", "cpu", "cores"}
    assert document["machine"]["cores"] == os.cpu_count()
    assert document["command"][-6:] == ["--repeats", "1", "--seconds", "1", "--json", str(file)]
    measured = [path["name"] for path in document["paths"]]
    assert measured[:2] == ["udptun", "plain routing"]
    assert sorted([*measured, *document["missing"]]) == ["kernel vxlan", "plain routing", "udptun"]
    assert [one["path"] for one in document["runs"]] == measured
    for one in document["runs"]:
        received = one["raw"]["end"]["sum_received"]["bits_per_second"]
        assert received > 0
        assert one["gbit_per_s"] == pytest.approx(received / 1e9)
        assert document["summary"][one["path"]]["tcp_1_gbit_per_s"]["median"] == one["gbit_per_s"]
    ratio = document["summary"]["udptun"]["ratio_to"]["plain routing"]
    assert ratio["median"] == pytest.approx(document["runs"][0]["gbit_per_s"] / document["runs"][1]["gbit_per_s"])
    assert list(tmp_path.iterdir()) == [file]


def test_bench_refuses_a_file_it_cannot_write_before_it_measures() -> None:
    bench = run("bench", "--json", "/nonexistent/result.json")
    assert bench.returncode == 1
    assert bench.stderr == (
        "error: cannot write /nonexistent/result.json: No such file or directory; name another --json file\n"
    )
    assert "round" not in bench.stdout


def test_lookup_benchmark_checks_its_answers_and_prints_a_line_for_every_size() -> None:
    lookup = run("bench.micro.lookup", "--repeats", "2")
    assert (lookup.returncode, lookup.stderr) == (0, "")
    figure = r" +\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)"
    for n in ("1", "1,000", "65,534"):
        assert re.search(rf"^{n}{figure}{figure}$", lookup.stdout, re.MULTILINE), lookup.stdout

"""The lab itself, with a stand-in for the daemon."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from traffic import processes

from udptun.lab import cli, podman
from udptun.lab.comparison import Way, kernel_vxlan, plain_routing
from udptun.lab.errors import CommandError, LabError
from udptun.lab.host import SUBNET_ENV, UNDERLAY
from udptun.lab.machine import wait_until
from udptun.lab.topology import LAB_DIR, Lab, Offload

pytestmark = pytest.mark.netns

FAKE_DAEMON = [sys.executable, str(Path(__file__).with_name("fake_daemon.py"))]


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Two hosts with the fake daemon and a pod each: pods 10.99.1.2 and 10.99.2.2."""
    with Lab(f"t{os.getpid()}", daemon_command=FAKE_DAEMON) as lab:
        lab.start()
        yield lab


def ping(source: Any, address: object) -> None:
    source.run(["ping", "-c", "2", "-i", "0.1", "-W", "5", str(address)])


# --- the package


def test_pods_reach_each_other_over_the_daemons_routes(lab: Lab) -> None:
    one, two = lab.host(1).pod(1), lab.host(2).pod(1)
    assert (str(one.address), str(two.address)) == ("10.99.1.2", "10.99.2.2")
    ping(one, two.address)
    ping(two, one.address)


def test_pods_reach_each_other_through_the_real_daemon_and_nothing_crosses_in_clear_text(
    two_hosts: Lab, tmp_path: Path
) -> None:
    one, two = two_hosts.host(1).pod(1), two_hosts.host(2).pod(1)

    def lines(expression: str) -> list[str]:
        return two_hosts.switch.run(["tcpdump", "-n", "-r", str(tmp_path / "c.pcap"), expression]).stdout.splitlines()

    with two_hosts.capture(tmp_path / "c.pcap"):
        ping(one, two.address)
        ping(two, one.address)
        wait_until("the tunnel's datagrams", lambda: len(lines("udp src port 8285 and udp dst port 8285")) >= 8, 10)
    assert lines("not arp and not (udp src port 8285 and udp dst port 8285)") == []


def test_host_has_its_own_run_and_state_directories_and_processes(lab: Lab) -> None:
    one, two = lab.host(1), lab.host(2)
    one.run(["touch", "/run/mark", "/var/lib/udptun/mark", "/var/lib/cni/mark"])
    for path in ("/run/mark", "/var/lib/udptun/mark", "/var/lib/cni/mark"):
        assert two.run(["test", "-e", path], check=False).returncode == 1
        assert not Path(path).exists()
    assert one.path("/run/mark").exists()
    assert one.path(SUBNET_ENV).read_text() != two.path(SUBNET_ENV).read_text()
    assert set(one.run(["ls", "/sys/class/net"]).stdout.split()) == {"lo", "eth0", "cni0", "cni0-p1"}
    assert "udptun.lab.holder" in one.path("/proc/1/cmdline").read_text()


def test_hosts_share_the_labs_directory(lab: Lab) -> None:
    lab.host(1).run(["sh", "-c", f"echo shared > {LAB_DIR}/mark"])
    assert lab.host(2).run(["cat", f"{LAB_DIR}/mark"]).stdout == "shared\n"
    assert not LAB_DIR.exists()


def test_host_reaps_processes_that_lost_their_parent(lab: Lab) -> None:
    host = lab.host(1)
    host.run(["sh", "-c", "(sleep 0.01; exit 3) & echo"])

    def zombies() -> list[str]:
        return [line for line in host.run(["ps", "-eo", "stat="]).stdout.splitlines() if line.startswith("Z")]

    wait_until("the host to have no zombies", lambda: not zombies() and not host_has(lab, 1, "sleep 0.01"), 5)


def host_has(lab: Lab, number: int, command: str) -> bool:
    return command in processes(lab.host(number)).values()


def test_stopping_the_daemon_leaves_what_it_started_and_power_cut_ends_it(lab: Lab) -> None:
    host = lab.host(1)
    assert host.stop_daemon() == 0
    assert host_has(lab, 1, "sleep 3600")
    host.start_daemon()
    host.wait_ready()
    child = host.popen(["sleep", "3601"])
    host.down()
    assert child.returncode == -signal.SIGKILL
    with pytest.raises(LabError, match="is it down"):
        host.run(["true"])
    host.down()


def test_host_added_later_is_reached_by_the_others(lab: Lab) -> None:
    lab.host(2).down()
    new = lab.add_host()
    new.start_daemon()
    new.wait_ready()
    ping(lab.host(1).pod(1), new.add_pod().address)


def test_host_that_moved_answers_at_its_new_address_only(lab: Lab) -> None:
    host = lab.host(1)
    host.move(UNDERLAY[99])
    assert json.loads(host.run(["ip", "-j", "-4", "address", "show", "eth0"]).stdout)[0]["addr_info"][0]["local"] == (
        "192.168.77.99"
    )
    ping(lab.host(2), UNDERLAY[99])
    ping(host, UNDERLAY[1])
    with pytest.raises(CommandError, match="100% packet loss"):
        lab.host(2).run(["ping", "-c", "1", "-W", "0.3", "192.168.77.11"])


@pytest.mark.parametrize("connect", [plain_routing, kernel_vxlan])
def test_comparison_way_connects_the_pods_beside_the_daemons_routes(lab: Lab, connect: Callable[[Lab], Way]) -> None:
    if connect is kernel_vxlan:
        probe = lab.host(1).run(["ip", "link", "add", "probe", "type", "vxlan", "id", "9", "dstport", "9"], check=False)
        if "Unknown device type" in probe.stderr:
            pytest.skip("the kernel has no vxlan")
    one, two = lab.host(1).pod(1), lab.host(2).pod(1)
    way = connect(lab)
    size = str(way.mtu - 28)
    # Neighbours resolve on the first; the second must fit in one piece.
    ping(one, way.address(two))
    one.run(["ping", "-c", "1", "-W", "5", "-M", "do", "-s", size, str(way.address(two))])
    ping(two, way.address(one))
    ping(one, two.address)


def test_capture_shows_what_crosses_the_underlay(lab: Lab, tmp_path: Path) -> None:
    def packets() -> list[str]:
        return lab.switch.run(["tcpdump", "-n", "-r", str(tmp_path / "c.pcap")]).stdout.splitlines()

    with lab.capture(tmp_path / "c.pcap", "icmp"):
        ping(lab.host(1).pod(1), lab.host(2).pod(1).address)
        wait_until("four captured packets", lambda: len(packets()) >= 4, 10)
    assert len(packets()) == 4
    assert "10.99.1.2 > 10.99.2.2: ICMP echo request" in packets()[0]


def test_capture_says_so_when_tcpdump_refuses_the_expression(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="syntax error"), lab.capture(tmp_path / "c.pcap", "nonsense here"):
        pass


def test_offload_modes_reach_both_ends_of_every_link(lab: Lab) -> None:
    def features(machine: Any, link: str) -> dict[str, str]:
        lines = machine.run(["ethtool", "-k", link]).stdout.splitlines()[1:]
        return {name.strip(): value.split()[0] for name, value in (line.split(":", 1) for line in lines)}

    def is_on(name: str) -> tuple[bool, bool]:
        return features(lab.host(1), "eth0")[name] == "on", features(lab.switch, "h1")[name] == "on"

    tso, udp, gro = "tcp-segmentation-offload", "tx-udp-segmentation", "generic-receive-offload"
    as_made = [is_on(name) for name in (tso, udp, gro)]
    lab.set_offload(Offload.NONE)
    assert [is_on(name) for name in (tso, udp, gro)] == [(False, False)] * 3
    lab.set_offload(Offload.RECEIVE)
    assert [is_on(name) for name in (tso, udp, gro)] == [(False, False), (False, False), (True, False)]
    lab.set_offload(Offload.FULL)
    assert [is_on(name) for name in (tso, udp, gro)] == as_made


def test_failing_daemon_is_reported_with_what_it_said() -> None:
    with (
        Lab(f"t{os.getpid()}", n_hosts=1, daemon_command=[*FAKE_DAEMON, "--fail"]) as lab,
        pytest.raises(LabError, match="daemon of h1 ended with status 1: fake daemon: told to fail"),
    ):
        lab.start()


def test_daemon_that_never_gets_ready_is_reported_after_the_timeout() -> None:
    with (
        Lab(f"t{os.getpid()}", n_hosts=1, daemon_command=["sleep", "3600"]) as lab,
        pytest.raises(LabError, match=r"daemon of h1 did not say READY=1 within 0\.2 s: it printed nothing"),
    ):
        lab.start(timeout=0.2)


def test_command_error_names_place_command_status_and_output(lab: Lab) -> None:
    with pytest.raises(CommandError, match=r"h1/p1: `sh -c 'echo why >&2; exit 7'` ended with status 7: why"):
        lab.host(1).pod(1).run(["sh", "-c", "echo why >&2; exit 7"])
    with pytest.raises(subprocess.TimeoutExpired):
        lab.host(1).run(["sleep", "60"], timeout=0.1)
    assert not host_has(lab, 1, "sleep 60")


# --- the command


class Command:
    """`udptun lab` as a user runs it.  Everything it starts is found by a token in its environment."""

    def __init__(self, name: str, processes_with: Callable[[str, str], dict[int, str]]) -> None:
        self.name = name
        self.processes_with = processes_with
        self.environment = {**os.environ, "UDPTUN_TEST_LAB": name}

    def popen(self, verb: str, *arguments: str, **streams: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "udptun", "lab", verb, "--name", self.name, *arguments],
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            **streams,
        )

    def __call__(self, verb: str, *arguments: str, **streams: Any) -> subprocess.CompletedProcess[str]:
        with self.popen(verb, *arguments, **streams) as child:
            out, err = child.communicate(timeout=60)
        return subprocess.CompletedProcess(child.args, child.returncode, out, err)

    def up(self, *arguments: str, daemon: str = " ".join(FAKE_DAEMON)) -> subprocess.CompletedProcess[str]:
        return self("up", "--daemon", daemon, *arguments)

    def status(self) -> Any:
        return json.loads(self("status", "--json").stdout)

    def processes(self) -> dict[int, str]:
        return self.processes_with("UDPTUN_TEST_LAB", self.name)

    def wait_gone(self, timeout_s: float = 10) -> None:
        try:
            wait_until(f"nothing to be left of lab {self.name}", lambda: not self.processes(), timeout_s)
        except LabError as exc:
            raise AssertionError(f"{exc}: {self.processes()}") from exc


@pytest.fixture
def command(processes_with: Callable[[str, str], dict[int, str]]) -> Iterator[Command]:
    made = Command(f"t{os.getpid()}-{time.time_ns() % 10**9}", processes_with)
    yield made
    made("down")
    made.wait_gone()


def test_up_ends_after_the_owner_goes_on_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, an `up` that ended at once took the lab with it: its end was still the owner's."""
    ours, owners = socket.socketpair()

    def slow_owner(options: argparse.Namespace, starter: socket.socket, starter_pid: int) -> None:
        starter.sendall(b"\n")
        starter.recv(1)
        time.sleep(0.5)
        owners.sendall(str(os.getpid()).encode())
        starter.sendall(b"\n")
        os._exit(0)

    monkeypatch.setattr(cli, "_own", slow_owner)
    assert cli._up(argparse.Namespace()) == 0
    owner_pid = int(ours.recv(100, socket.MSG_DONTWAIT))
    os.waitpid(owner_pid, 0)
    ours.close()
    owners.close()


def test_up_exec_status_down_do_what_they_say(command: Command) -> None:
    up = command.up("--hosts", "3", "--pods", "2")
    assert up.returncode == 0, up.stderr
    assert "lab: host h3 is ready: subnet 10.99.3.0/24" in up.stdout
    assert "lab: pod h3/p2 has 10.99.3.3" in up.stdout
    assert command("exec", "h1/p2", "--", "ping", "-c", "1", "-W", "5", "10.99.3.3").returncode == 0
    assert command("exec", "h2", "--", "hostname").stdout == "h2\n"
    assert "underlay" in command("exec", "underlay", "--", "ls", "/sys/class/net").stdout.split()
    status = command.status()
    assert [host["name"] for host in status["hosts"]] == ["h1", "h2", "h3"]
    assert status["hosts"][1]["pods"][1] == {"name": "p2", "address": "10.99.2.3", "ipv6_address": None}
    assert status["hosts"][1]["daemon_pid"] is not None
    assert "h2/p2" in command("status").stdout
    examined = command("doctor", "--json", "h3", "h1")
    assert examined.returncode == 2
    said = json.loads(examined.stdout)
    # A daemon of the tests speaks to nobody.
    assert {name: it["findings"][0]["check"] for name, it in said.items()} == {"h3": "daemon", "h1": "daemon"}
    assert command("down").returncode == 0
    assert not command.processes()
    assert "there is no lab named" in command("status").stderr


@pytest.mark.parametrize("is_ipv4", [True, False], ids=["both families", "IPv6 alone"])
def test_status_of_a_lab_knows_the_addresses_of_both_families(command: Command, tmp_path: Path, is_ipv4: bool) -> None:
    """With IPv6 alone the first `status` or `exec` ended the lab: its owner died of a KeyError."""
    conf = {"EnableIPv4": is_ipv4, "EnableIPv6": True, "Network": "10.244.0.0/16", "IPv6Network": "fd00:244::/48"}
    file = tmp_path / "net-conf.json"
    file.write_text(json.dumps(conf))
    up = command("up", "--hosts", "1", "--ipv6", "--net-conf", str(file))
    assert up.returncode == 0, up.stderr
    (host,) = command.status()["hosts"]
    (pod,) = host["pods"]
    assert ip_address(pod["ipv6_address"]) in ip_network(host["ipv6_subnet"])
    assert (pod["address"] == pod["ipv6_address"], host["subnet"] is None) == (not is_ipv4, not is_ipv4)
    assert host["underlay_ipv6"] == "fd00:77::b"
    words = pod["address"] if not is_ipv4 else f"{pod['address']} and {pod['ipv6_address']}"
    assert f"lab: pod h1/p1 has {words}\n" in up.stdout
    text = command("status").stdout
    assert f"h1/p1     {words.replace(' and ', ' ')}\n" in text
    assert f"subnet {' '.join(filter(None, (host['subnet'], host['ipv6_subnet'])))}, daemon pid" in text
    assert command("exec", "h1/p1", "--", "ping", "-c", "1", pod["ipv6_address"]).returncode == 0


@pytest.fixture
def lab_of_two(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The status of a lab of h1 and h2, which are this machine; its `words` are run in place of the doctor."""
    status: dict[str, Any] = {"hosts": [{"name": "h1", "up": True}, {"name": "h2", "up": True}], "words": {}}

    class Here:
        def __init__(self, name: str) -> None:
            self._name = name

        def popen(self, command: list[str], **how: Any) -> subprocess.Popen[str]:
            return subprocess.Popen(["sh", "-c", status["words"][self._name]], text=True, **how)

    running = argparse.Namespace(connection=contextlib.nullcontext(), status=lambda: status)
    monkeypatch.setattr(cli.owner.RunningLab, "find", lambda _: running)
    monkeypatch.setattr(cli, "_place", lambda _, name: Here(name))
    return status


def doctor_options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"name": "x", "hosts": [], "json": True, "all": False, **changes})


def test_doctor_of_a_lab_without_a_host_says_so(lab_of_two: dict[str, Any]) -> None:
    """Before, the greatest exit status of none was a ValueError."""
    lab_of_two["hosts"] = [{"name": "h1", "up": False}]
    with pytest.raises(LabError, match="no host of the lab x is up"):
        cli._doctor(doctor_options())


def test_doctor_that_says_nothing_on_one_host_leaves_what_the_others_say(
    lab_of_two: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, its empty text was read as JSON, and the command ended with a traceback."""
    lab_of_two["words"] = {"h1": "exit 1", "h2": "echo '{}'"}
    assert cli._doctor(doctor_options()) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"h1": None, "h2": {}}
    assert printed.err == "udptun lab doctor: the one on h1 ended with status 1 and has said nothing\n"
    assert cli._doctor(doctor_options(json=False)) == 2
    lab_of_two["words"]["h1"] = "echo '{}'; exit 1"
    assert cli._doctor(doctor_options()) == 1


def test_mesh_of_a_lab_is_that_of_the_named_host_or_of_the_first_one_that_is_up(
    lab_of_two: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    lab_of_two["words"] = {"h1": "echo of h1; exit 1", "h2": "echo of h2"}

    def mesh(host: str | None) -> tuple[int, str]:
        status = cli._mesh(argparse.Namespace(name="x", host=host, json=False, html=None))
        return status, capfd.readouterr().out

    assert mesh(None) == (1, "of h1\n")
    assert mesh("h2") == (0, "of h2\n")
    lab_of_two["hosts"][0]["up"] = False
    assert mesh(None) == (0, "of h2\n")
    lab_of_two["hosts"] = []
    with pytest.raises(LabError, match="no host of the lab x is up"):
        mesh(None)


def test_exec_passes_status_input_terminal_and_directory_through(command: Command, tmp_path: Path) -> None:
    assert command.up("--hosts", "1").returncode == 0
    assert command("exec", "h1", "--", "sh", "-c", "exit 7").returncode == 7
    assert command("exec", "h1", "--", "sh", "-c", "kill -9 $$").returncode == 137
    assert command("exec", "h1", "no-such-command").returncode == 127
    assert command("exec", "h1", "--", "pwd").stdout == f"{Path.cwd()}\n"
    terminal, ours = pty.openpty()
    try:
        assert command("exec", "h1/p1", "--", "test", "-t", "0", stdin=ours).returncode == 0
    finally:
        os.close(terminal)
        os.close(ours)
    wrong = command("exec", "h2", "--", "true")
    assert (wrong.returncode, "has no h2; it has underlay, h1, h1/p1" in wrong.stderr) == (1, True)


def test_exec_hands_a_termination_signal_to_its_command(command: Command) -> None:
    assert command.up("--hosts", "1").returncode == 0
    script = "trap 'exit 9' TERM; echo go; while :; do sleep 0.02; done"
    with command.popen("exec", "h1", "--", "sh", "-c", script) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "go\n"
        child.terminate()
        assert child.wait(10) == 9


def test_second_up_of_a_name_is_refused_and_the_first_goes_on(command: Command) -> None:
    assert command.up("--hosts", "1").returncode == 0
    second = command.up("--hosts", "1")
    assert (second.returncode, f"there is a lab named {command.name} already" in second.stderr) == (1, True)
    assert command("exec", "h1", "--", "true").returncode == 0


def test_two_labs_run_side_by_side(command: Command) -> None:
    other = Command(f"{command.name}-b", command.processes_with)
    assert command.up().returncode == 0
    assert other.up().returncode == 0
    for one in (command, other):
        assert one("exec", "h1/p1", "--", "ping", "-c", "1", "-W", "5", "10.99.2.2").returncode == 0
    assert other("down").returncode == 0
    other.wait_gone()
    assert command("exec", "h1/p1", "--", "ping", "-c", "1", "-W", "5", "10.99.2.2").returncode == 0


def test_nothing_is_left_when_the_owner_is_killed(command: Command) -> None:
    assert command.up().returncode == 0
    status = command.status()
    namespaces = {
        Path(f"/proc/{host['holder_pid']}/ns/{kind}").readlink()
        for host in status["hosts"]
        for kind in ("net", "mnt", "pid")
    }
    assert len(namespaces) == 6
    os.kill(status["owner_pid"], signal.SIGKILL)
    command.wait_gone()
    # The orphaned daemons are for the init of this machine to reap, which may take its time (seconds where it polls).
    wait_until("the namespaces to go", lambda: not namespaces & namespaces_in_use(), 60)
    assert command.up().returncode == 0


def namespaces_in_use() -> set[Path]:
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/*"):
        try:
            found.add(link.readlink())
        except OSError:
            continue
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_up_is_interrupted(command: Command, how: signal.Signals) -> None:
    with command.popen("up", "--daemon", "sleep 3600") as up:
        assert up.stdout is not None
        assert "connects h1, h2" in up.stdout.readline()
        # As a terminal does: to the whole foreground process group.
        os.killpg(up.pid, how)
        assert up.wait(10) == (130 if how is signal.SIGINT else -how)
    command.wait_gone()


needs_containers = pytest.mark.skipif(bool(podman.missing_packages()), reason=f"needs {podman.missing_packages()}")


@needs_containers
def test_pods_of_a_lab_with_cni_are_containers_that_exec_and_status_know(command: Command) -> None:
    up = command.up("--cni", "--pods", "2", "--hosts", "1")
    assert up.returncode == 0, up.stderr
    assert "lab: pod h1/p2 has 10.99.1.3" in up.stdout
    assert [pod["address"] for pod in command.status()["hosts"][0]["pods"]] == ["10.99.1.2", "10.99.1.3"]
    assert command("exec", "h1/p1", "--", "ping", "-c", "1", "-W", "5", "10.99.1.3").returncode == 0
    assert command("exec", "h1", "--", "podman", "exec", "p1", "hostname").stdout == "p1\n"
    inside = command("exec", "h1", "--", "podman", "exec", "p2", "ip", "-4", "-o", "addr", "show", "eth0").stdout
    assert "10.99.1.3/24" in inside


@needs_containers
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_containers_when_up_is_interrupted(command: Command, how: signal.Signals) -> None:
    """Container and conmon have an environment of their own, so they are told by their machine's namespaces."""
    with command.popen("up", "--cni", "--pods", "20", "--hosts", "1", "--daemon", " ".join(FAKE_DAEMON)) as up:
        assert up.stdout is not None
        while "pod h1/p1 has" not in up.stdout.readline():
            assert up.poll() is None
        holders = [pid for pid, line in command.processes().items() if "udptun.lab.holder" in line]
        namespaces = {Path(f"/proc/{pid}/ns/{kind}").readlink() for pid in holders for kind in ("net", "mnt", "pid")}
        assert len(namespaces) == 6
        assert any("conmon" in line for line in command_lines(namespaces))
        os.killpg(up.pid, how)
        assert up.wait(10) == (130 if how is signal.SIGINT else -how)
    command.wait_gone()
    # The orphans are for the init of this machine to reap, which may take its time (seconds where it polls).
    wait_until("the namespaces to go", lambda: not namespaces & namespaces_in_use(), 60)
    assert not re.search("/run/busybox|/run/containers/graph", Path("/proc/self/mountinfo").read_text())


def command_lines(namespaces: set[Path]) -> list[str]:
    """Of the processes in one of these pid namespaces."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "ns" / "pid").readlink() in namespaces:
                found.append((entry / "cmdline").read_text())
    return found


def test_a_lab_with_cni_names_the_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(podman, "PLUGIN_DIRS", [Path("/nonexistent")])
    # One that needs libraries, as that of Debian's package busybox.
    monkeypatch.setattr(podman, "_BUSYBOX", Path("/bin/ls"))
    found = shutil.which
    monkeypatch.setattr(podman.shutil, "which", lambda name: None if name == "podman" else found(name) or f"/{name}")
    packages = ["podman", "containernetworking-plugins", "busybox-static"]
    said = f"a lab with --cni needs {', '.join(packages)}: apt-get install {' '.join(packages)}"
    with pytest.raises(LabError, match=re.escape(said)), Lab(f"t{os.getpid()}", cni=True):
        pass


@needs_containers
def test_podman_that_has_not_used_cni_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """podman 5 has no CNI back end."""
    with Lab(f"t{os.getpid()}", n_hosts=1) as lab:
        client = podman.Podman(lab.host(1).machine)
        monkeypatch.setattr(podman.Podman, "__call__", lambda self, *words: "an-id")
        with pytest.raises(LabError, match=r"podman of h1 has not used CNI for its container p1 .* needs podman 4"):
            client.run_pod("p1")


def test_up_in_the_background_of_a_script_can_be_interrupted(command: Command) -> None:
    """A shell without job control starts `up &` with SIGINT ignored: `up` went on whatever it was sent."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        up = command.popen("up", "--daemon", "sleep 3600")
    finally:
        signal.signal(signal.SIGINT, before)
    with up:
        assert up.stdout is not None
        assert "connects h1, h2" in up.stdout.readline()
        os.killpg(up.pid, signal.SIGINT)
        assert up.wait(10) == 130
    command.wait_gone()


def test_exec_in_the_background_of_a_script_gives_its_command_the_default_sigint(command: Command) -> None:
    assert command.up("--hosts", "1").returncode == 0
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert command("exec", "h1", "--", "sh", "-c", "kill -INT $$").returncode == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_up_with_a_failing_daemon_says_why_and_leaves_nothing(command: Command) -> None:
    up = command.up(daemon=" ".join([*FAKE_DAEMON, "--fail"]))
    assert up.returncode == 1
    assert up.stderr.count("\n") == 1
    assert "the daemon of h1 ended with status 1: fake daemon: told to fail" in up.stderr
    assert not command.processes()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--hosts", "0"], "a lab has 1 to 240 hosts, not 0"),
        (["--net-conf", "/nonexistent"], "cannot read the network config /nonexistent: No such file or directory"),
    ],
)
def test_up_refuses_what_it_cannot_do(command: Command, arguments: list[str], reason: str) -> None:
    up = command.up(*arguments)
    assert (up.returncode, reason in up.stderr) == (1, True)


def test_lab_name_that_could_be_mistaken_is_refused(command: Command) -> None:
    wrong = Command("../x", command.processes_with)("status")
    assert (wrong.returncode, "cannot name a lab" in wrong.stderr) == (1, True)

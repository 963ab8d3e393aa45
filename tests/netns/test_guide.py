"""docs/guide.md: its commands, run as they stand there, print what it shows; and what they show is flannel's.

    container p1 -- cni0 [h1] eth0 -- \\
    container p2 -- cni0 [h1]          underlay 192.168.77.1: API server, and the outside
    container p1 -- cni0 [h2] eth0 -- /         (h3 likewise)

The containers are podman's, on flannel's configuration.  Each section of the page has a lab of its own, which its
commands make and remove.  The page's lab is called `lab`; here a program `udptun` in front gives it another name.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kube_server import MISSING
from traffic import seconds_until

from udptun.commands import status
from udptun.lab.machine import Place
from udptun.lab.owner import RunningLab
from udptun.lab.podman import missing_packages

LACKING = [*missing_packages(), *MISSING]
pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}"),
]

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide.md"
DEADLINE_S = 90.0

KINDS = ("udp", "vxlan", "direct", "host-gw")
"""The labs of the page, in its order."""

PEERS = {2: ("10.244.2.0", "192.168.77.12"), 3: ("10.244.3.0", "192.168.77.13")}
"""The other hosts as h1 sees them: the address of their VXLAN device, and that of the underlay."""


@dataclass(frozen=True, slots=True)
class Step:
    """A command of the page, and what the page says that it prints."""

    command: str
    shown: list[str]


def labs_of_the_page() -> list[list[Step]]:
    """The page's commands, in the parts that `udptun lab down` ends."""
    found: list[list[Step]] = [[]]
    for line in GUIDE.read_text().splitlines():
        if line.startswith("    $ "):
            if found[-1] and found[-1][-1].command == "udptun lab down":
                found.append([])
            found[-1].append(Step(line[6:], []))
        elif line.startswith("    ") and found[-1]:
            found[-1][-1].shown.append(line[4:])
    return found


CHANGING = (
    (r"\b([0-9a-f]{2}:){5}[0-9a-f]{2}\b", "MAC"),
    (r"\bveth[0-9a-f]{8}\b", "vethX"),
    (r"\b[0-9a-f]{64}\b", "ID"),
    (r"\bpid \d+", "pid N"),
    (r"\bid \d+, seq \d+", "id N, seq N"),
    (r"\bseq=\d+ ttl=(\d+) time=[\d.]+", r"seq=N ttl=\1 time=N"),
    (r"= [\d.]+/[\d.]+/[\d.]+ ms", "= N ms"),
    (r"(\.\d+)\.\d{5} >", r"\1.PORT >"),
    (r"^\d+: ", "N: "),
    (r"@if\d+", "@ifN"),
    # What `udptun status` measures.
    (r"\bup [\dhms]+, (\d+ workers?)?", "up N, "),
    (r", (all offloads|offloads all but [\w, ]+), confinement", ", confinement"),
    # Who has just joined may send before its lease has come here.
    (r"^drops +\d packets, none now; see docs/wire-format.md$", "drops      none"),
    (r"^ +\d +- +sender is no host's PublicIP  decap_drop_unknown_peer.*", ""),
    # With --shortcut it says more.
    (r"(confinement full),.*", r"\1"),
    (r"last news \w+ ago", "last news"),
    (r"(\d alive); out .*", r"\1"),
    (r" alive +[\d.]+ .*", " alive"),
)
"""What differs from run to run."""


def settled(lines: list[str]) -> list[str]:
    for pattern, text in CHANGING:
        lines = [re.sub(pattern, text, line) for line in lines]
    return [line.rstrip() for line in lines if line.strip()]


class Shell:
    """One shell for the commands of a section, as a reader has it."""

    def __init__(self, directory: Path, lab: str) -> None:
        self.lab = lab
        program = directory / "bin" / "udptun"
        program.parent.mkdir()
        udptun = f"{sys.executable} -m udptun"
        named = f'if [ "$1" = lab ]; then verb=$2; shift 2; exec {udptun} lab "$verb" --name {lab} "$@"; fi'
        program.write_text(f'#!/bin/sh\n{named}\nexec {udptun} "$@"\n')
        program.chmod(0o755)
        path = f"{program.parent}:{os.environ['PATH']}"
        self._bash = subprocess.Popen(
            ["bash", "--norc"],
            cwd=directory,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(directory / "errors").open("w"),
            text=True,
        )
        self.errors = directory / "errors"

    def run(self, command: str) -> list[str]:
        """What the command prints, without what it says on standard error."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f"{command}\nprintf '\\n%s %d\\n' 'end of' $?\n")
        self._bash.stdin.flush()
        lines: list[str] = []
        while not (lines and lines[-1].startswith("end of ")):
            line = self._bash.stdout.readline()
            assert line, f"the shell has ended at: {command}"
            lines.append(line.rstrip("\n").replace(self.lab, "lab"))
        assert lines.pop() == "end of 0", f"{command}: {lines} {self.errors.read_text()}"
        return lines

    def close(self) -> None:
        self._bash.communicate(timeout=DEADLINE_S)


@dataclass(frozen=True, slots=True)
class GuideLab:
    """A lab of the page that is up: `steps` are those between the commands that make it and the one that removes it."""

    kind: str
    shell: Shell
    steps: list[Step]
    status: Any

    def place(self, name: str) -> Place:
        machine, _, pod = name.partition("/")
        holders = [self.status["switch"], *self.status["hosts"]]
        (pid,) = (it["holder_pid"] for it in holders if it["name"] == machine)
        return Place(machine, pid, pod or None)

    def run(self, place: str, *command: str) -> str:
        with self.place(place).popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            out, error = child.communicate(timeout=DEADLINE_S)
        assert child.returncode == 0, f"{place} {command}: {error}"
        return out

    def show(self, place: str, *command: str) -> Any:
        """What `ip` or `bridge` says, without the empty members that `ip -j` has for what it leaves out."""
        found = json.loads(self.run(place, command[0], "-j", "-d", *command[1:]) or "[]")
        return [it for it in found if it]


@pytest.fixture(scope="module", params=KINDS)
def guide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuideLab]:
    """One lab of the page after the other."""
    if (
        request.param in ("vxlan", "direct")
        and subprocess.run(
            ["unshare", "-n", "ip", "link", "add", "probe", "type", "vxlan", "id", "9", "dstport", "9"],
            capture_output=True,
        ).returncode
    ):
        pytest.skip("the kernel has no vxlan")
    *steps, down = labs_of_the_page()[KINDS.index(request.param)]
    shell = Shell(tmp_path_factory.mktemp("guide"), f"g{os.getpid()}{request.param}")
    try:
        while True:
            step = steps.pop(0)
            assert settled(shell.run(step.command)) == settled(step.shown), step.command
            if step.command.startswith("udptun lab up"):
                break
        running = RunningLab.find(shell.lab)
        with running.connection:
            lab = GuideLab(request.param, shell, steps, running.status())
        for host in lab.status["hosts"]:
            # A host is ready before it knows all the others.
            seconds_until(lambda host=host: len(peers(lab, host["name"])) == 2, "all peers", DEADLINE_S)  # type: ignore[misc]
        yield lab
        assert settled(shell.run(down.command)) == settled(down.shown)
    finally:
        shell.close()
        subprocess.run([sys.executable, "-m", "udptun", "lab", "down", "--name", shell.lab], capture_output=True)


def peers(lab: GuideLab, host: str) -> list[Any]:
    found: list[Any] = json.loads(status.fetch(lab.place(host).path("/run/udptun")))["peers"]
    return found


@pytest.mark.timeout(400)
def test_commands_of_the_page_print_what_it_shows(guide: GuideLab) -> None:
    for step in guide.steps:
        assert settled(guide.shell.run(step.command)) == settled(step.shown), step.command


@pytest.mark.parametrize("guide", ["udp"], indirect=True)
def test_containers_of_one_host_are_wired_as_flannels_configuration_says(guide: GuideLab) -> None:
    ports = guide.show("h1", "ip", "link", "show", "master", "cni0")
    assert [(it["mtu"], it["linkinfo"]["info_kind"]) for it in ports] == [(1472, "veth")] * 2
    assert all(it["linkinfo"]["info_slave_data"]["hairpin"] for it in ports)
    (bridge,) = guide.show("h1", "ip", "-4", "addr", "show", "cni0")
    assert (bridge["mtu"], [it["local"] for it in bridge["addr_info"]]) == (1472, ["10.244.1.1"])
    for number, pod in enumerate(("h1/p1", "h1/p2"), 2):
        (link,) = guide.show(pod, "ip", "-4", "addr", "show", "eth0")
        assert (link["mtu"], [(it["local"], it["prefixlen"]) for it in link["addr_info"]]) == (
            1472,
            [(f"10.244.1.{number}", 24)],
        )
        # The other end is a port of the bridge.
        assert link["link_index"] in [it["ifindex"] for it in ports]
        routes = {it["dst"]: it.get("gateway") for it in guide.show(pod, "ip", "route")}
        assert routes == {"default": "10.244.1.1", "10.244.0.0/16": "10.244.1.1", "10.244.1.0/24": None}


@pytest.mark.parametrize("guide", ["udp"], indirect=True)
def test_connections_have_the_hosts_address_outside_and_their_own_in_the_pod_network(guide: GuideLab) -> None:
    """Where the listener is decides, not who connects: TCP from a container that podman has made."""
    serve = (
        "import socket; s = socket.create_server(('', 7000)); print(flush=True);"
        "print(*(s.accept()[1][0] for _ in range(2)))"
    )
    for listener, address, seen in (
        ("underlay", "192.168.77.1", "192.168.77.11 192.168.77.12"),
        ("h3/p1", "10.244.3.2", "10.244.1.2 10.244.2.2"),
        ("h1/p2", "10.244.1.3", "10.244.1.2 10.244.2.2"),
    ):
        command = [sys.executable, "-IS", "-c", serve]
        with guide.place(listener).popen(command, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None
                server.stdout.readline()
                for host in ("h1", "h2"):
                    connect = f"echo | nc -w 30 {address} 7000"
                    guide.run(host, "podman", "exec", "p1", "sh", "-c", connect)
                assert server.communicate(timeout=DEADLINE_S)[0].strip() == seen
            finally:
                server.kill()


def test_the_kernel_has_what_flannel_would_have_set_up_for_its_peers(guide: GuideLab) -> None:
    device = {"udp": "flannel0", "host-gw": None}.get(guide.kind, "flannel.1")
    routes = {
        it["dst"]: (it.get("gateway"), it["dev"], it["flags"])
        for it in guide.show("h1", "ip", "-4", "route", "show", "proto", "158", "type", "unicast")
    }
    if guide.kind == "udp":
        assert routes == {"10.244.0.0/16": (None, "flannel0", [])}
    elif guide.kind == "vxlan":
        assert routes == {f"{vtep}/24": (vtep, "flannel.1", ["onlink"]) for vtep, _ in PEERS.values()}
    else:
        assert routes == {f"{vtep}/24": (host, "eth0", []) for vtep, host in PEERS.values()}
    if device == "flannel.1":
        macs = {number: guide.show(f"h{number}", "ip", "link", "show", "flannel.1")[0]["address"] for number in PEERS}
        tunnelled = PEERS if guide.kind == "vxlan" else {}
        neighbours = {it["dst"]: it["lladdr"] for it in guide.show("h1", "ip", "-4", "neigh", "show", "dev", device)}
        assert neighbours == {vtep: macs[number] for number, (vtep, _) in tunnelled.items()}
        fdb = {it["mac"]: it.get("dst") for it in guide.show("h1", "bridge", "fdb", "show", "dev", device)}
        assert fdb == {macs[number]: host for number, (_, host) in tunnelled.items()}


WIRE = {"udp": "udp port 8285", "vxlan": "udp port 8472", "direct": "src net 10.244.0.0/16", "host-gw": "icmp"}
"""What carries the packets of containers from host to host."""


def test_containers_of_all_hosts_reach_each_other_with_packets_of_the_whole_mtu(
    guide: GuideLab, tmp_path: Path
) -> None:
    """On the wire is what the backend says, and nothing else.  The API server and ARP are not the containers'."""
    overhead = {"udp": 28, "host-gw": 0}.get(guide.kind, 50)
    capture = tmp_path / "capture.pcap"
    tcpdump = ["tcpdump", "-i", "underlay", "-U", "--immediate-mode", "-Z", "root", "-w", str(capture), "ip", "and"]

    def seen(expression: str) -> list[str]:
        """A line for each packet.  What is inside a VXLAN frame has a second one, without a time."""
        lines = guide.run("underlay", "tcpdump", "-nr", str(capture), expression).splitlines()
        return [line for line in lines if re.match(r"\d\d:", line)]

    with guide.place("underlay").popen([*tcpdump, "not", "tcp"], stderr=subprocess.PIPE) as recorder:
        try:
            assert recorder.stderr is not None
            while "listening on" not in recorder.stderr.readline():
                assert recorder.poll() is None
            pods = {f"h{number}/p1": f"10.244.{number}.2" for number in (1, 2, 3)}
            for source in pods:
                for destination, address in pods.items():
                    if source != destination:
                        size = str(1500 - overhead - 28)
                        guide.run(source, "ping", "-c", "1", "-W", "10", "-M", "do", "-s", size, address)
            guide.run("h1", "ping", "-c", "1", "192.168.77.1")
            witness = "icmp and host 192.168.77.1"
            seconds_until(lambda: len(seen(witness)) == 2, "the last packet in the capture", DEADLINE_S)
        finally:
            recorder.terminate()
    assert len(seen(f"{WIRE[guide.kind]} and greater 1400")) == 12
    assert seen(f"greater 1400 and not ({WIRE[guide.kind]})") == []


@pytest.mark.parametrize("guide", ["udp"], indirect=True)
def test_policies_of_others_hold_in_front_of_flannels_rules_and_not_behind_them(guide: GuideLab) -> None:
    """kube-router has its rules at the front of FORWARD, kube-network-policies in a chain before the translation."""

    def passes(source: str, address: str) -> bool:
        with guide.place(source).popen(["ping", "-c", "1", "-W", "1", address], stdout=subprocess.DEVNULL) as ping:
            return ping.wait(DEADLINE_S) == 0

    def rule(verb: str, *where: str) -> None:
        drop = ("-s", "10.244.2.2", "-d", "10.244.1.2", "-j", "DROP")
        guide.run("h1", "iptables", "-w", verb, "FORWARD", *where, *drop)

    def wait_for(source: str, address: str) -> None:
        seconds_until(lambda: passes(source, address), f"an answer of {address} to {source}", DEADLINE_S)

    rule("-I", "1")
    assert not passes("h2/p1", "10.244.1.2")
    wait_for("h3/p1", "10.244.1.2")
    rule("-D")
    wait_for("h2/p1", "10.244.1.2")
    # Behind flannel's, which accepts, a rule of iptables is never reached: it has to be in front.
    rule("-A")
    wait_for("h2/p1", "10.244.1.2")
    rule("-D")
    chain = "add chain inet policies out { type filter hook postrouting priority 95; }"
    dropped = [
        f"ip saddr {source} ip daddr {to}"
        for source, to in (("10.244.1.2", "192.168.77.1"), ("10.244.2.2", "10.244.1.2"))
    ]
    script = ["add table inet policies", chain, *(f"add rule inet policies out {it} drop" for it in dropped)]
    guide.run("h1", "nft", "; ".join(script))
    assert not passes("h1/p1", "192.168.77.1")
    assert not passes("h2/p1", "10.244.1.2")
    guide.run("h1", "nft", "delete table inet policies")
    wait_for("h1/p1", "192.168.77.1")

"""The commands of README.md, read from it and run as they stand there, but for where udptun is installed.

`./dev demo` is tested in test_demo.py, the lines that install in tests/unit/test_packaging.py, and what etcd needs in
test_etcd_hosts.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from ipaddress import IPv4Network
from pathlib import Path

import page_commands
import pytest
from traffic import make_private

from udptun.lab.machine import wait_until
from udptun.lab.topology import Lab

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]
UDPTUN = f"{sys.executable} -m udptun"
INSTALLED = "/opt/udptun/bin/udptun"


def commands(heading: str, *first_words: str) -> list[str]:
    """Lines of the README's indented blocks under `heading` that begin with one of the words."""
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.split()[0] in first_words]


def test_lab_of_the_readme_comes_up_answers_and_goes() -> None:
    name = f"r{os.getpid()}"
    up, status, ping, udptun_status, down = commands("Try it in 60 seconds", ".venv/bin/udptun")

    def run(line: str) -> str:
        for verb in ("up", "status", "exec", "down"):
            line = line.replace(f".venv/bin/udptun lab {verb}", f"{UDPTUN} lab {verb} --name {name}")
        line = line.replace("$PWD/.venv/bin/udptun", UDPTUN)
        assert ".venv" not in line.replace(sys.executable, "")
        done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    try:
        run(up)
        assert "h3/p2" in run(status)
        lab = json.loads(run(f"{status.partition('#')[0]} --json"))
        example = ping.partition("#")[0].split()[-1]
        other = next(pod["address"] for host in lab["hosts"] if host["name"] == "h2" for pod in host["pods"])
        assert " 0% packet loss" in run(ping.replace(example, other))
        assert run(udptun_status).startswith("udptun     all is well\n")
    finally:
        run(down)


def test_two_hosts_of_the_readme_connect_by_hand() -> None:
    """On hosts as they come, but for what the first two lines install."""
    heading = "Two hosts by hand, no server"
    typed = [it.text for it in page_commands.commands(ROOT / "README.md")]
    typed = typed[typed.index(first_of(heading)) : typed.index("udptun status") + 1]
    install, make, *prepare, daemon, ping, doctor, status = typed
    assert [it.split()[0] for it in (install, make, ping)] == ["apt-get", "python3", "ping"]
    assert [it.split()[:2] for it in (daemon, doctor)] == [["udptun", "daemon"], ["udptun", "doctor"]]
    with Lab(f"m{os.getpid()}") as lab:
        one, two = lab.hosts
        for host in lab.hosts:
            # Directories of its own: the lab's machines share the real ones.
            host.run(["sh", "-c", "cp -a /etc /run/etc && mount --bind /run/etc /etc"], timeout=60)
            make_private(host, "/opt", "/usr/local/bin")
            host.run(["rm", "-f", "/opt/udptun", "/usr/local/bin/udptun"])
            host.run(["sh", "-c", "mkdir -p /opt/udptun/bin && sysctl -qw net.ipv4.ip_forward=0"])
            host.path(INSTALLED).write_text(f'#!/bin/sh\nexec {UDPTUN} "$@"\n')
            host.path(INSTALLED).chmod(0o755)
            for line in prepare:
                host.run(["sh", "-c", line])
            leases = host.path("/etc/udptun-leases.json")
            edited = leases.read_text()
            for example, real in (("192.0.2.1", one), ("192.0.2.2", two)):
                assert example in edited
                edited = edited.replace(example, str(real.underlay_address))
            leases.write_text(edited)
            host.start_daemon(command=daemon.split())
        for host in lab.hosts:
            host.wait_ready()
        wait_until("the other host", lambda: one.run(["sh", "-c", ping], check=False).returncode == 0, 30)
        wait_until("nothing wrong", lambda: "nothing wrong" in one.run(["sh", "-c", doctor], check=False).stdout, 30)
        for host in lab.hosts:
            host.add_pod()
        assert [host.subnet for host in lab.hosts] == [IPv4Network("10.244.1.0/24"), IPv4Network("10.244.2.0/24")]
        between_pods = ["ping", "-c", "1", "-W", "1", str(two.pod(1).address)]
        wait_until("a ping", lambda: one.pod(1).run(between_pods, check=False).returncode == 0, 5)
        lines = one.run(["sh", "-c", status]).stdout.splitlines()
        shown = [re.sub(r"192\.0\.2\.", "192.168.77.1", line) for line in screen(heading)]
        # With --shortcut it says that too.
        lines = [line.removesuffix(", shortcut on") for line in lines]
        lines = [re.sub(r"\d+s ago", "4s ago", re.sub(r"\bup \w+,", "up 3m20s,", line)) for line in lines if line]
        assert lines[: len(shown)] == shown
        # As it says that it is ended.
        assert one.stop_daemon() == 0
        assert one.pod(1).run(between_pods, check=False).returncode == 0
        one.run(["udptun", "cleanup"])
        assert "flannel0" not in one.run(["ip", "link"]).stdout


def first_of(heading: str) -> str:
    """The first command under `heading`."""
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1]
    return next(line.strip() for line in section.splitlines() if line.startswith("    "))


def screen(heading: str) -> list[str]:
    """What the README shows under `heading` of `udptun status`, without empty lines."""
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n    ...\n")[0]
    block = section[section.index("    udptun     ") :]
    return [line[4:] for line in block.splitlines() if line.strip()]


def test_etcd_commands_of_the_readme_are_those_that_the_etcd_tests_run() -> None:
    """Key, config and flags: test_etcd_hosts.py starts hosts with them against a real etcd."""
    (put,) = commands("Many hosts, with etcd", "etcdctl")
    (flanneld,) = commands("Many hosts, with etcd", "/opt/udptun/bin/flanneld")
    assert json.loads(put.split("'")[1]) == {"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}
    assert put.split()[2] == "/coreos.com/network/config"
    assert [word for word in flanneld.split() if word.startswith("--")] == ["--etcd-endpoints", "--etcd-cafile"]

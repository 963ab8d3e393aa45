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

import pytest

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
    heading = "Two hosts by hand, no server"
    with Lab(f"m{os.getpid()}") as lab:
        one, two = lab.hosts
        for host in lab.hosts:
            # An /etc of its own: the lab's machines share the real one.
            host.run(["sh", "-c", "cp -a /etc /run/etc && mount --bind /run/etc /etc"], timeout=60)
            *prepare, daemon = commands(heading, "mkdir", "echo", INSTALLED)
            assert [line.split()[0] for line in prepare] == ["mkdir", "echo", INSTALLED]
            for line in prepare:
                host.run(["sh", "-c", line.replace(INSTALLED, UDPTUN)])
            leases = host.path("/etc/udptun-leases.json")
            edited = leases.read_text()
            for example, real in (("192.0.2.1", one), ("192.0.2.2", two)):
                assert example in edited
                edited = edited.replace(example, str(real.underlay_address))
            leases.write_text(edited)
            words = daemon.replace(INSTALLED, UDPTUN).split()
            host.start_daemon(command=words)
        for host in lab.hosts:
            host.wait_ready()
            host.add_pod()
        assert [host.subnet for host in lab.hosts] == [IPv4Network("10.244.1.0/24"), IPv4Network("10.244.2.0/24")]
        ping = ["ping", "-c", "1", "-W", "1", str(two.pod(1).address)]
        wait_until("a ping", lambda: one.pod(1).run(ping, check=False).returncode == 0, 5)
        status = one.run([*UDPTUN.split(), "status"]).stdout.splitlines()
        shown = commands(heading, "udptun", "lease", "store", "underlay", "backend", "datapath")
        status = [re.sub(r"\d+s ago", "4s ago", line) for line in status if line]
        assert [line.split()[0] for line in status[:6]] == [line.split()[0] for line in shown]
        assert status[:3] == shown[:3]


def test_etcd_commands_of_the_readme_are_those_that_the_etcd_tests_run() -> None:
    """Key, config and flags: test_etcd_hosts.py starts hosts with them against a real etcd."""
    (put,) = commands("Many hosts, with etcd", "etcdctl")
    (flanneld,) = commands("Many hosts, with etcd", "/opt/udptun/bin/flanneld")
    assert json.loads(put.split("'")[1]) == {"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}
    assert put.split()[2] == "/coreos.com/network/config"
    assert [word for word in flanneld.split() if word.startswith("--")] == ["--etcd-endpoints", "--etcd-cafile"]

"""The commands of the pages (tests/page_commands.py), run on a host of a lab as they stand there.

    pod h1/p1 -- cni0 - flannel0 [h1] eth0 -- underlay -- eth0 [h2] flannel0 - cni0 -- pod h2/p1

A reader sits at h1, which has an /etc, an /opt and a directory of the reader's own.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube_server import HAS_KUBECTL, Client, Real, write_kubeconfig
from page_commands import IN_SENTENCES, ROOT, RUN, Command, Example, commands
from traffic import REAL_TIME, make_private, wait_for_peers

from udptun.lab.machine import wait_until
from udptun.lab.topology import LEASES, NET_CONF, Lab

pytestmark = pytest.mark.netns

DEADLINE_S = 60.0

CHANGING = (
    (r"\d+ checks, \d+ peers? asked", "N checks, N asked"),
    (r"\d+ do(es)? not apply", "N do not apply"),
)
"""What depends on the host."""

PROGRAMS = {"udptun": "", "flanneld": "daemon", "mk-docker-opts.sh": "docker-opts"}


class Reader:
    """Who sits at h1 and types what the pages say."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.host = lab.host(1)
        other = lab.host(2)
        self.places = {
            "own": str(self.host.pod(1).address),
            "peer": str(other.pod(1).address),
            "subnet": str(self.host.subnet),
            "peers_subnet": str(other.subnet),
            "gateway": str(self.host.gateway),
        }
        self._back = {
            str(self.host.subnet): "10.244.1.0/24",
            str(other.subnet): "10.244.2.0/24",
            self.places["own"]: "10.244.1.2",
            self.places["peer"]: "10.244.2.2",
        }
        self.host.run(["sh", "-c", "cp -a /etc /run/etc && mount --bind /run/etc /etc"])
        make_private(self.host, "/opt")
        self.host.run(["rm", "-f", "/opt/udptun", "/opt/cni"])
        self.host.run(["mkdir", "-p", "/opt/udptun/bin", "/run/reader", "/etc/kube-flannel"])
        self.host.run(["cp", str(NET_CONF), "/etc/kube-flannel/net-conf.json"])
        for name, command in PROGRAMS.items():
            program = self.host.path(f"/opt/udptun/bin/{name}")
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -m udptun {command} "$@"\n')
            program.chmod(0o755)
        self.host.path("/run/reader/deploy").symlink_to(ROOT / "deploy")
        self.host.path("/run/reader/10-flannel.conflist").write_text(conflist())

    def type(self, line: str) -> subprocess.CompletedProcess[str]:
        setting = f"cd /run/reader; export FLANNELD_STORE=local:{LEASES} PYTHONPATH={ROOT} PATH=/opt/udptun/bin:$PATH"
        return self.host.run(["bash", "-c", f"{setting}\n{line}"], check=False, timeout=DEADLINE_S)

    def arrange(self, line: str) -> None:
        """What is not on the page."""
        if line:
            done = self.type(line)
            assert done.returncode == 0, f"{line}: {done.stderr}"

    def on_the_page(self, text: str) -> str:
        """With the addresses of the page for those of this lab."""
        for here, there in self._back.items():
            text = text.replace(here, there)
        return text


def conflist() -> str:
    """The configuration that docs/cni.md shows."""
    (block,) = re.findall(r"^    \{\n(?:    .*\n)+?    \}\n", (ROOT / "docs" / "cni.md").read_text(), re.MULTILINE)
    return str(block)


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    with Lab(f"w{os.getpid()}", n_hosts=2, n_pods=1) as lab:
        lab.daemon_command[:0] = REAL_TIME
        lab.start()
        wait_for_peers(lab)
        yield Reader(lab)


def variants(text: str) -> list[str]:
    """Without what stands in brackets, and with it."""
    return [re.sub(r" \[.*?\]", "", text), *([re.sub(r"[\[\]]", "", text)] if " [-" in text else [])]


@pytest.mark.parametrize("page", RUN)
def test_commands_of_the_page_do_what_it_says(page: str, reader: Reader) -> None:
    if page == "docs/cni.md" and not Path("/usr/lib/cni/bridge").exists():
        pytest.skip("needs containernetworking-plugins")
    shown = {it.text: it for it in commands(ROOT / page)}
    for text, example in RUN[page].items():
        reader.arrange(example.before)
        for line in variants(text):
            is_done = functools.partial(does_what_it_says, reader, line, shown[text], example)
            if example.settles:
                wait_until(f"{line} to do what {page} says", is_done, DEADLINE_S)
            else:
                assert is_done()
        reader.arrange(example.after)


def does_what_it_says(reader: Reader, line: str, command: Command | None, example: Example) -> bool:
    for there, here in example.real:
        line = line.replace(there, here.format(**reader.places))
    done = reader.type(f"{line}\nstatus=$?; {{ {example.then}; }} && exit $status")
    text = reader.on_the_page(done.stdout)
    if done.returncode != example.status:
        result = False
    elif command is not None and example.is_shown:
        result = settled(text.splitlines()) == settled(command.shown)
    elif line.endswith("--json"):
        result = text.startswith('{"schema": 1, ')
    else:
        pattern = re.sub(r"\{(\w+)\}", lambda it: re.escape(reader.places[it[1]]), example.prints)
        result = bool(re.search(pattern, done.stdout, re.MULTILINE))
    if not result:
        # pytest shows what was printed beside a failure.
        print(f"{line}: {done.returncode}\n{done.stdout}{done.stderr}")
    return result


def settled(lines: Sequence[str]) -> list[str]:
    for pattern, text in CHANGING:
        lines = [re.sub(pattern, text, line) for line in lines]
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("page", IN_SENTENCES)
def test_commands_in_sentences_of_the_page_are_right(page: str, reader: Reader) -> None:
    for text, example in IN_SENTENCES[page].items():
        assert does_what_it_says(reader, text, None, example)


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.skipif(not HAS_KUBECTL, reason="needs kubectl")
def test_kubectl_does_on_a_real_api_server_what_the_page_says(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In the order of the page.  No controllers run: the test says in their place that pods are ready, and ends a
    namespace."""
    program = request.config.getoption("--kube-apiserver")
    if program is None:
        pytest.skip("give kube-apiserver's program with --kube-apiserver PATH")
    lines = [it.text for it in commands(ROOT / "docs/kubernetes.md") if it.text.startswith("kubectl ")]
    assert len(lines) > 10
    with ExitStack() as undo:
        cluster = Cluster(Real(undo, tmp_path, program), tmp_path)
        for line in lines:
            if "delete daemonset" in line:
                # flannel's, which runs before.
                cluster.run("kubectl apply -f deploy/kube-flannel.yml")
            if "rollout status" in line:
                cluster.say_that_pods_are_ready(line.rpartition("/")[2])
            out = cluster.run(line)
            if "rollout status" in line:
                assert "successfully rolled out" in out
            elif "edit configmap" in line:
                assert '"Type": "udp"' in cluster.get("configmaps/kube-flannel-cfg")["data"]["net-conf.json"]
            elif "patch daemonset" in line:
                (patch,) = re.findall(r"-p '(.*)'", line)
                (ours,) = (it for it in yaml.safe_load_all(MANIFEST.read_text()) if it["kind"] == "DaemonSet")
                # The server does not know it.
                update = json.loads(patch)["spec"]["updateStrategy"]["rollingUpdate"]
                assert update.keys() <= ours["spec"]["updateStrategy"]["rollingUpdate"].keys()
            elif "rollout restart" in line:
                template = cluster.daemon_set("kube-flannel-ds")["spec"]["template"]
                assert "kubectl.kubernetes.io/restartedAt" in template["metadata"]["annotations"]
            elif line.startswith("kubectl label"):
                labels = cluster.admin.get(NAMESPACE)["metadata"]["labels"]
                assert labels["pod-security.kubernetes.io/enforce"] == "privileged"
        assert cluster.admin.ask("GET", NAMESPACE).status == 404


MANIFEST = ROOT / "deploy" / "kube-flannel.yml"
NAMESPACE = "/api/v1/namespaces/kube-flannel"


class Cluster:
    """What a person has who types kubectl's commands, and a controller's part."""

    def __init__(self, server: Real, directory: Path) -> None:
        self.admin = Client(server.url, ca=server.ca)
        config = write_kubeconfig(directory / "kubeconfig", server.url, ca=server.ca)
        self._clone = directory / "clone"
        (self._clone / "deploy").mkdir(parents=True)
        for name in ("kube-flannel.yml", "cleanup.yml"):
            # Debian's Kubernetes is 1.20, for which the page says what to write.
            text = (ROOT / "deploy" / name).read_text().replace("maxUnavailable: 0", "maxUnavailable: 1")
            (self._clone / "deploy" / name).write_text(re.sub(r" +maxSurge: 1\n", "", text))
        self._environ = {
            **os.environ,
            "KUBECONFIG": str(config),
            "EDITOR": "sed -i s/vxlan/udp/",
            "HOME": str(directory),
        }

    def run(self, line: str) -> str:
        with subprocess.Popen(
            ["sh", "-c", line],
            cwd=self._clone,
            env=self._environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as done:
            if "delete -f" in line:
                wait_until(f"the end of {line}", lambda: self._end_namespace() or done.poll() is not None, DEADLINE_S)
            out, _ = done.communicate(timeout=DEADLINE_S)
        assert done.returncode == 0, f"{line}: {out}"
        return out

    def _end_namespace(self) -> None:
        answer = self.admin.ask("GET", NAMESPACE)
        if answer.status == 200 and "deletionTimestamp" in answer.value["metadata"]:
            self.admin.ask("PUT", f"{NAMESPACE}/finalize", {**answer.value, "spec": {"finalizers": []}})

    def get(self, path: str) -> Any:
        return self.admin.get(f"{NAMESPACE}/{path}")

    def daemon_set(self, name: str) -> Any:
        return self.admin.get(f"/apis/apps/v1/namespaces/kube-flannel/daemonsets/{name}")

    def say_that_pods_are_ready(self, name: str) -> None:
        numbers = dict.fromkeys(
            ("currentNumberScheduled", "numberMisscheduled", "desiredNumberScheduled", "numberReady"), 0
        )
        status = {**numbers, "observedGeneration": self.daemon_set(name)["metadata"]["generation"]}
        path = f"/apis/apps/v1/namespaces/kube-flannel/daemonsets/{name}/status"
        answer = self.admin.ask("PATCH", path, {"status": status}, "application/merge-patch+json")
        assert answer.status == 200, answer

"""The CNI plugin as a runtime runs it, and a delegate that records how it was run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from udptun.cni import install

NAME = "cni-flannel"
IPV4_ENV = "\nFLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
IPV6_ENV = "\nFLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00::1/64\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
DUAL_ENV = IPV4_ENV + "".join(f"{line}\n" for line in IPV6_ENV.splitlines() if "IPV6" in line)
MULTIPLE_ENV = IPV4_ENV.replace("10.1.0.0/16", "10.1.0.0/16,192.168.0.0/16")
"""The four subnet.env of flannel's own tests; each begins with an empty line."""

_FAKE = """\
#!/bin/sh
# Notes environment and stdin, and answers as the test wants.
n=$(ls {directory} | grep -c env)
cat >{directory}/$n.stdin
env >{directory}/$n.env
if [ -e {directory}/answer-$CNI_COMMAND ]; then . {directory}/answer-$CNI_COMMAND; fi
[ "$CNI_COMMAND" != ADD ] || echo '{{"cniVersion":"0.3.1","ips":[]}}'
"""


@dataclass
class Answer:
    """How one run ended.  `document` is the JSON on stdout, empty when there was none."""

    status: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.stdout) if self.stdout.strip() else {}

    def result(self) -> dict[str, Any]:
        """What a run that succeeded has answered."""
        assert self.status == 0, f"{self.stdout} {self.stderr}"
        return self.document

    def error(self) -> dict[str, Any]:
        """What a run that failed has answered: one JSON object with code and msg."""
        assert self.status == 1, f"{self.status} {self.stdout} {self.stderr}"
        assert "Traceback" not in self.stderr
        assert set(self.document) <= {"cniVersion", "code", "msg", "details"}
        return self.document


def start_here(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(*args, text=True, **kwargs)


@dataclass
class Plugin:
    """The installed plugin with files of its own below `directory`; `program` is the installed file."""

    directory: Path
    program: Path
    plugins: tuple[str, ...] = ()
    """Directories of other plugins."""
    popen: Callable[..., subprocess.Popen[str]] = start_here
    """Starts the program: here, or in a host of a lab (`Machine.popen`)."""
    conf: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.conf = {
            "name": NAME,
            "type": "flannel",
            "subnetFile": str(self.subnet_file),
            "dataDir": str(self.data_dir),
        } | self.conf

    @property
    def subnet_file(self) -> Path:
        return self.directory / "subnet.env"

    @property
    def data_dir(self) -> Path:
        return self.directory / "data"

    def environ(self, command: str, container_id: str, netns: str, ifname: str, **changes: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container_id,
            "CNI_NETNS": netns,
            "CNI_IFNAME": ifname,
            "CNI_PATH": ":".join((str(self.directory / "bin"), *self.plugins)),
            **changes,
        }

    def start(
        self,
        command: str,
        container_id: str = "c1",
        netns: str = "/proc/self/ns/net",
        ifname: str = "eth0",
        conf: Mapping[str, Any] | str | None = None,
        **changes: str,
    ) -> subprocess.Popen[str]:
        """Start it with `conf`'s members over the usual ones, or with a text."""
        text = conf if isinstance(conf, str) else json.dumps(self.conf | dict(conf or {}))
        process = self.popen(
            [str(self.program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environ(command, container_id, netns, ifname, **changes),
        )
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.close()
        process.stdin = None
        return process

    def run(self, command: str, *args: Any, **kwargs: Any) -> Answer:
        """As `start`, to the end."""
        return finish(self.start(command, *args, **kwargs))

    def stored(self, container_id: str = "c1") -> str | None:
        path = self.data_dir / container_id
        return path.read_text() if path.exists() else None


def finish(process: subprocess.Popen[str]) -> Answer:
    stdout, stderr = process.communicate(timeout=60)
    return Answer(process.returncode, stdout, stderr)


def installed(directory: Path) -> Path:
    """The plugin, installed as `flannel` in `directory` by the installer."""
    directory.mkdir(parents=True, exist_ok=True)
    install.install(str(directory), "flannel", install.launcher())
    return directory / "flannel"


class FakeDelegate:
    """A plugin `bridge` that does nothing but remember."""

    def __init__(self, plugin: Plugin, kind: str = "bridge") -> None:
        self._directory = plugin.directory / f"fake-{kind}"
        self._directory.mkdir()
        (plugin.directory / "bin").mkdir(exist_ok=True)
        program = plugin.directory / "bin" / kind
        program.write_text(_FAKE.format(directory=self._directory))
        program.chmod(0o755)

    def answer(self, command: str, script: str) -> None:
        """Run this shell script at `command` from now on."""
        (self._directory / f"answer-{command}").write_text(script)

    def fail(self, command: str, code: int = 11, message: str = "no luck", details: str = "none") -> None:
        self.answer(command, f"echo '{json.dumps({'code': code, 'msg': message, 'details': details})}'\nexit 1\n")

    @property
    def calls(self) -> list[str]:
        return [self.environ(n)["CNI_COMMAND"] for n in range(len(list(self._directory.glob("*.env"))))]

    def environ(self, n: int) -> dict[str, str]:
        lines = (self._directory / f"{n}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def stdin(self, n: int) -> str:
        return (self._directory / f"{n}.stdin").read_text()


def python_at_its_barest() -> list[str]:
    """The interpreter as the installed file runs it."""
    return [sys.executable, "-I", "-S"]

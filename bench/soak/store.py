"""The lease stores of a soak: what they say, what others write there, and how they go away."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from bench.errors import BenchError
from udptun.lab.host import UNDERLAY
from udptun.lab.machine import wait_until
from udptun.lab.topology import LAB_DIR, LEASES, NET_CONF, Lab

REAL_TIME = ("chrt", "--rr", "1")
"""Goes before the command of a daemon.  The queues of the tunnel hold some tenths of a second; on a busy machine an
ordinary process may wait longer for a processor, and then packets are lost whatever the datapath does.  Goes before the
commands that look at hosts, and `udptun cleanup`, as well: so they take no longer on a busy machine."""

PREFIX = "/coreos.com/network"
ETCD_PORT = 2379
DEADLINE_S = 90.0
"""Of whatever is done to a host or the store.  Nothing of it takes long, but on a busy machine."""
_END = Path(__file__).with_name("database_end.py")
Statements = list[tuple[str, list[list[str]]]]
"""SQL, and rows of parameters to execute it with."""


class Store(Protocol):
    """Keys are flannel's, such as 10.244.7.0-24; values are leases in flannel's JSON."""

    daemon_flags: tuple[str, ...]
    """What a daemon of the lab is told about the store."""
    outages: tuple[str, ...]
    outages_at_start: tuple[str, ...]
    """Those that a daemon outlives which starts meanwhile: it does not take a config of its own for an outage."""

    def start(self, conf: Mapping[str, object]) -> None:
        """Begin to serve, with this network config."""

    def leases(self) -> dict[str, str]:
        """Key -> value, past the daemons."""

    def put(self, leases: Mapping[str, str]) -> None:
        """Write what others would."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete what anybody has written."""

    def configure(self, conf: Mapping[str, object]) -> None:
        """Change the network config.  The daemons read it when they are told to."""

    def away(self, how: str) -> contextlib.AbstractContextManager[None]:
        """The outage `how`, one of `outages`, while the block runs."""


class LocalStore:
    """The one database of all hosts."""

    daemon_flags: tuple[str, ...] = ("--store", f"local:{LEASES}", "--net-config-path", str(NET_CONF))
    outages: tuple[str, ...] = ("locked", "replaced by a directory")
    outages_at_start = outages[:1]

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def start(self, conf: Mapping[str, object]) -> None:
        self.configure(conf)

    @contextlib.contextmanager
    def _database(self) -> Iterator[Callable[[Statements], list[list[str]]]]:
        """Executes statements, in a process of the lab: SQLite follows the links of a path that leads there."""
        command = [*REAL_TIME, sys.executable, "-I", "-S", str(_END), str(LEASES)]
        with self._lab.switch.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            write, read = process.stdin, process.stdout

            def execute(statements: Statements) -> list[list[str]]:
                write.write(json.dumps(statements) + "\n")
                write.flush()
                if not (line := read.readline()):
                    raise BenchError(f"cannot work on {LEASES}; standard error says why")
                found: list[list[str]] = json.loads(line)
                return found

            yield execute

    def leases(self) -> dict[str, str]:
        with self._database() as execute:
            return dict(execute([("select key, value from leases", [[]])]))

    def put(self, leases: Mapping[str, str]) -> None:
        rows = [[key, value] for key, value in leases.items()]
        self._write("insert or replace into leases (key, value) values (?, ?)", rows)

    def delete(self, keys: Iterable[str]) -> None:
        self._write("delete from leases where key = ?", [[key] for key in keys])

    def _write(self, statement: str, rows: list[list[str]]) -> None:
        with self._database() as execute:
            execute([("begin immediate", [[]]), (statement, rows), ("commit", [[]])])

    def configure(self, conf: Mapping[str, object]) -> None:
        self._lab.switch.at().path(NET_CONF).write_text(json.dumps(conf))

    @contextlib.contextmanager
    def away(self, how: str) -> Iterator[None]:
        if how == "locked":
            with self._database() as execute:
                execute([("begin exclusive", [[]])])
                yield
                execute([("rollback", [[]])])
            return
        path = self._lab.switch.at().path(LEASES)
        aside = path.with_suffix(".away")
        path.rename(aside)
        while True:
            # A daemon that opens its store just then makes a new one.
            path.unlink(missing_ok=True)
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
        try:
            yield
        finally:
            path.rmdir()
            aside.rename(path)


class EtcdStore:
    """A real etcd in the lab's switch."""

    daemon_flags: tuple[str, ...] = (f"--etcd-endpoints=http://{UNDERLAY[1]}:{ETCD_PORT}",)
    outages: tuple[str, ...] = ("killed", "stopped", "frozen", "compacted while it is cut off")
    outages_at_start = outages

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._process: subprocess.Popen[str] | None = None

    def start(self, conf: Mapping[str, object]) -> None:
        self._run()
        self.configure(conf)

    def _run(self) -> None:
        urls = f"http://{UNDERLAY[1]}:{ETCD_PORT}"
        with (self._lab.switch.at().path(LAB_DIR) / "etcd.log").open("a") as output:
            self._process = self._lab.switch.popen(
                [
                    "etcd",
                    f"--data-dir={LAB_DIR}/etcd",
                    f"--listen-client-urls={urls},http://127.0.0.1:{ETCD_PORT}",
                    f"--advertise-client-urls={urls}",
                    "--listen-peer-urls=http://127.0.0.1:0",
                    "--unsafe-no-fsync",
                    "--log-outputs=stderr",
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": os.environ["PATH"]},
                new_session=True,
            )
        wait_until("etcd to be healthy", lambda: self._etcdctl("endpoint", "health").returncode == 0, DEADLINE_S)

    def _end(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(DEADLINE_S)

    def _etcdctl(self, *arguments: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
        # Past a firewall that cuts the hosts off.
        command = ["etcdctl", f"--endpoints=http://127.0.0.1:{ETCD_PORT}", *arguments]
        return self._lab.switch.run(
            [*REAL_TIME, "env", "ETCDCTL_API=3", *command], check=False, timeout=DEADLINE_S, input=input
        )

    def _do(self, *arguments: str, input: str | None = None) -> str:
        done = self._etcdctl(*arguments, input=input)
        if done.returncode:
            raise BenchError(f"etcdctl {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def leases(self) -> dict[str, str]:
        lines = self._do("get", "--prefix", f"{PREFIX}/subnets/").splitlines()
        return {
            key.removeprefix(f"{PREFIX}/subnets/"): value for key, value in zip(lines[::2], lines[1::2], strict=True)
        }

    def put(self, leases: Mapping[str, str]) -> None:
        self._transaction([f"put {PREFIX}/subnets/{key} {json.dumps(value)}" for key, value in leases.items()])

    def delete(self, keys: Iterable[str]) -> None:
        self._transaction([f"del {PREFIX}/subnets/{key}" for key in keys])

    def _transaction(self, lines: list[str]) -> None:
        self._do("txn", input="\n".join(["", *lines, "", ""]) + "\n")

    def configure(self, conf: Mapping[str, object]) -> None:
        self._do("put", f"{PREFIX}/config", json.dumps(conf))

    @contextlib.contextmanager
    def away(self, how: str) -> Iterator[None]:
        assert self._process is not None
        if how == "frozen":
            with self._frozen():
                yield
        elif how == "compacted while it is cut off":
            self._lab.switch.run(["iptables", "-I", "INPUT", "-i", "underlay", "-p", "tcp", "-j", "DROP"])
            try:
                yield
                revision = json.loads(self._do("endpoint", "status", "-w", "json"))[0]["Status"]["header"]["revision"]
                self._do("put", "/somebody/else", "once more")
                self._do("compact", str(revision + 1))
            finally:
                self._lab.switch.run(["iptables", "-D", "INPUT", "-i", "underlay", "-p", "tcp", "-j", "DROP"])
        else:
            self._end(signal.SIGKILL if how == "killed" else signal.SIGTERM)
            try:
                yield
            finally:
                self._run()

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """It takes connections (the kernel does) and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


STORES: Mapping[str, Callable[[Lab], Store]] = {"local": LocalStore, "etcd": EtcdStore}

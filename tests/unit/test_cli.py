"""The command line: which command runs with what, what it prints, and its exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from start_undone import start_undone

import udptun
from udptun import __version__
from udptun.commands import cli, status
from udptun.commands.status import Request
from udptun.config.flags import Options
from udptun.config.service_manager import ServiceManager
from udptun.config.store_flags import StoreKind
from udptun.core.errors import ConfigError, KernelError

UDPTUN = [sys.executable, "-m", "udptun"]


class Fakes:
    """Stands in for the modules that the commands dispatch to, and notes how they are called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.calls: list[tuple[Any, ...]] = []

    def put(self, name: str, function: str, result: object = 0) -> None:
        """Make `udptun.<name>.<function>` return `result`, or raise it."""

        def fake(*args: object, **kwargs: object) -> object:
            self.calls.append((*args, kwargs) if kwargs else args)
            if isinstance(result, BaseException):
                raise result
            return result

        module = sys.modules.get(f"udptun.{name}")
        if not isinstance(module, FakeModule):
            module = FakeModule(f"udptun.{name}")
        setattr(module, function, fake)
        package, _, leaf = f"udptun.{name}".rpartition(".")
        self._monkeypatch.setitem(sys.modules, f"udptun.{name}", module)
        self._monkeypatch.setattr(importlib.import_module(package), leaf, module, raising=False)


class FakeModule(ModuleType):
    pass


_OF_THE_MANAGER = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "FDSTORE"]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Undo what the start of a daemon does to its process, which is this one here."""
    with start_undone():
        yield


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    for name in [name for name in os.environ if name.startswith("FLANNELD_")] + _OF_THE_MANAGER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/udptun"])
    return Fakes(monkeypatch)


def status_of(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_daemon_runs_with_its_options_and_gives_its_status(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLANNELD_NODE", "n1")
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    fakes.put("control.daemon", "run", 7)
    assert status_of("daemon", "-iface=eth0", "--store=file:/l") == 7
    ((options, manager),) = fakes.calls
    assert isinstance(options, Options)
    assert manager == ServiceManager(watchdog_s=30)
    assert (options.iface, str(options.store), options.node) == (("eth0",), "file:/l", "n1")


def test_flanneld_is_the_daemon_with_etcd_unless_a_store_is_named(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/bin/flanneld", "--store=local"])
    fakes.put("control.daemon", "run")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert status_of() == 0
    assert [options.store.kind for options, _manager in fakes.calls] == [StoreKind.LOCAL, StoreKind.ETCD]


@pytest.mark.parametrize("name", ["flanneld", "udptun"])
def test_version_flag_of_the_daemon_prints_to_stderr_as_flannels(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    assert status_of(*([] if name == "flanneld" else ["daemon"]), "-version") == 0
    assert capsys.readouterr() == ("", f"udptun {__version__}\n")


@pytest.mark.parametrize("argv", [["version"], ["--version"], ["-version"], ["cleanup", "--version"]])
def test_version_prints_to_stdout(fakes: Fakes, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert status_of(*argv) == 0
    assert capsys.readouterr() == (f"udptun {__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-h"], ["usage: udptun COMMAND", "daemon", "status", "cleanup", "lease", "lab", "version"]),
        (["--help"], ["usage: udptun COMMAND"]),
        (["help"], ["usage: udptun COMMAND"]),
        (["daemon", "-h"], ["usage: udptun daemon [FLAG...]", "--subnet-file FILE"]),
        (["cleanup", "--help"], ["usage: udptun cleanup [--release] [FLAG...]", "--run-dir DIR"]),
        (["status", "--help"], ["usage: udptun status", "--json"]),
        (["lease", "--help"], ["usage: udptun lease list", "lease reserve SUBNET|KEY", "--etcd-endpoints URLS"]),
        (["lease", "show", "-h"], ["usage: udptun lease list", "--store STORE"]),
        (["lease", "init", "--help"], ["usage: udptun lease init", "--force"]),
    ],
    ids=" ".join,
)
def test_help_is_printed_and_is_no_error(
    fakes: Fakes, capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]
) -> None:
    assert status_of(*argv) == 0
    out, err = capsys.readouterr()
    assert all(word in out for word in words)
    assert err == ""


def test_overview_goes_to_stderr_with_status_2_when_there_is_no_command(
    fakes: Fakes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: udptun COMMAND")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["stauts"], "unknown command stauts; did you mean status? (udptun --help lists the commands)"),
        (["--jsn"], "unknown flag --jsn (udptun --help lists the commands)"),
        (["daemon", "--ifcae=x"], "unknown flag --ifcae; did you mean --iface?"),
        (["daemon", "a\nb"], r"unexpected argument 'a\nb'; the daemon takes flags only"),
        (["daemon", "--a\nb"], r"unknown flag --a\nb"),
        (["daemon", "--store=kube"], "env variables POD_NAME and POD_NAMESPACE must be set, or NODE_NAME"),
        (["status", "--jsn"], "status: unrecognized arguments: --jsn"),
        (["status", "--js"], "status: unrecognized arguments: --js"),
        (["status", "--watch", "0"], "status: argument --watch: '0' is no number of seconds from 0.1 to 86400"),
        (["status", "--peer", "h2"], "status: argument --peer: 'h2' is no subnet, as 10.244.3.0/24, and no address"),
        (["lease"], "lease: what to do is missing: list, show, reserve, release or init"),
        (["lease", "lst"], "lease: unknown action lst: list, show, reserve, release or init"),
        (["lease", "list", "x"], "unexpected argument 'x'"),
        (["lease", "show"], "lease show: which one? give a SUBNET, as 10.244.3.0/24, or a KEY"),
        (["lease", "show", "nope"], "'nope' is neither a subnet as 10.244.3.0/24 nor a key as 10.244.3.0-24"),
        (["lease", "reserve", "10.1.2.0/24"], "lease reserve: --public-ip or --public-ipv6 is missing"),
        (["lease", "release", "10.1.2.0-40"], "'10.1.2.0-40' is neither a subnet"),
        (["lease", "init"], "lease init: the following arguments are required: PATH"),
        (["version", "x"], "version: unrecognized arguments: x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_are_one_line_with_status_2(
    fakes: Fakes, capsys: pytest.CaptureFixture[str], argv: list[str], line: str
) -> None:
    assert status_of(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"udptun: error: {line}")
    assert err.count("\n") == 1


def test_each_problem_of_a_configuration_has_its_line(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.put("control.daemon", "run", ConfigError("Network: bad", "SubnetLen: worse"))
    assert status_of("daemon") == 2
    assert capsys.readouterr().err == "udptun: error: Network: bad\nudptun: error: SubnetLen: worse\n"


def test_a_run_time_failure_has_status_1(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.put("control.daemon", "run", KernelError("cannot open /dev/net/tun", 1, "run as root"))
    assert status_of("daemon") == 1
    assert capsys.readouterr().err == "udptun: error: cannot open /dev/net/tun: EPERM; run as root\n"


def test_an_interrupt_has_status_130(fakes: Fakes) -> None:
    fakes.put("control.daemon", "run", KeyboardInterrupt())
    assert status_of("daemon") == 130


def test_a_broken_pipe_that_is_not_stdouts_is_not_hidden(fakes: Fakes) -> None:
    fakes.put("control.daemon", "run", BrokenPipeError("some socket"))
    with pytest.raises(BrokenPipeError, match="some socket"):
        cli.main(["daemon"])


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_reader_that_goes_away_gives_status_141_and_no_traceback(unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as stdout:
        done = subprocess.run(
            [*UDPTUN, "daemon", "-h"],
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_closed_stdout_is_no_error() -> None:
    done = subprocess.run(["/bin/sh", "-c", 'exec "$@" >&-', "sh", *UDPTUN, "version"], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("argv", "environ", "wanted"),
    [
        ([], {"TERM": "xterm"}, Request(Path("/run/udptun"))),
        (["--json"], {"FLANNELD_RUN_DIR": "/e", "TERM": "xterm"}, Request(Path("/e"), as_json=True)),
        (["--run-dir", "/d"], {"FLANNELD_RUN_DIR": "/e", "TERM": "xterm"}, Request(Path("/d"))),
        (["--watch"], {"TERM": "xterm"}, Request(Path("/run/udptun"), watch_s=1.0)),
        (["--watch", "0.5"], {"TERM": "xterm"}, Request(Path("/run/udptun"), watch_s=0.5)),
        (["--peer", "10.0.1.0/24"], {"TERM": "xterm"}, Request(Path("/run/udptun"), peer="10.0.1.0/24")),
        (["--peer=fd00::1"], {"TERM": "xterm"}, Request(Path("/run/udptun"), peer="fd00::1")),
        ([], {"TERM": "xterm", "NO_COLOR": "1"}, Request(Path("/run/udptun"), has_colours=False)),
        ([], {"TERM": "xterm", "NO_COLOR": ""}, Request(Path("/run/udptun"))),
        ([], {"TERM": "dumb"}, Request(Path("/run/udptun"), has_colours=False, is_dumb=True)),
        ([], {"TERM": ""}, Request(Path("/run/udptun"), has_colours=False, is_dumb=True)),
    ],
)
def test_status_shows_what_the_daemon_of_the_run_dir_says(
    fakes: Fakes,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    environ: dict[str, str],
    wanted: Request,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(status, "show", lambda given: 1 if given == wanted else pytest.fail(str(given)))
    assert status_of("status", *argv) == 1


@pytest.mark.parametrize("release", [False, True])
def test_cleanup_takes_the_daemons_flags_and_release(fakes: Fakes, release: bool) -> None:
    fakes.put("commands.cleanup", "cleanup")
    assert status_of("cleanup", "--run-dir=/r", *(["--release"] if release else [])) == 0
    ((options, given),) = fakes.calls
    assert (options.run_dir, given) == (Path("/r"), release)


@pytest.mark.parametrize("force", [False, True])
def test_lease_init_writes_a_starter(fakes: Fakes, force: bool) -> None:
    fakes.put("stores.file", "write_starter", None)
    assert status_of("lease", "init", "/etc/leases.json", *(["--force"] if force else [])) == 0
    assert fakes.calls == [(Path("/etc/leases.json"), {"force": force})]


def test_lab_parses_and_runs_with_its_own_parser(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.put("lab.cli", "run", 3)

    def add_parser(subparsers: Any) -> None:
        lab = subparsers.add_parser("lab")
        lab.add_argument("--hosts", type=int)

    monkeypatch.setattr(sys.modules["udptun.lab.cli"], "add_parser", add_parser, raising=False)
    assert status_of("lab", "--hosts", "2") == 3
    ((namespace,),) = fakes.calls
    assert isinstance(namespace, argparse.Namespace)
    assert namespace.hosts == 2
    assert status_of("lab", "--hosts", "x") == 2
    assert capsys.readouterr().err == "udptun: error: lab: argument --hosts: invalid int value: 'x'\n"


def test_module_can_be_run_and_says_its_version() -> None:
    done = subprocess.run([*UDPTUN, "version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"udptun {udptun.__version__}\n"


def test_what_the_daemon_ignores_does_not_outlast_its_test(fakes: Fakes) -> None:
    """Before, daemons that later tests started ignored the same signals from their first moment on."""
    fakes.put("control.daemon", "run")
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert status_of("daemon") == 0
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN

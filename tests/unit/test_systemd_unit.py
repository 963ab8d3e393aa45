"""deploy/systemd: systemd takes the unit, and what it says fits the daemon."""

from __future__ import annotations

import ast
import configparser
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import udptun
from udptun.config import flags
from udptun.config.store_flags import StoreKind
from udptun.core.errors import ConfigError, UsageError

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = ROOT / "deploy" / "systemd"
UNIT = SYSTEMD / "udptun.service"


@pytest.fixture
def service() -> configparser.SectionProxy:
    # Some keys stand several times, which adds up.
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT)
    return parser["Service"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("wrong", [False, True], ids=["ours", "with-a-mistake"])
def test_systemd_takes_the_unit(wrong: bool, tmp_path: Path) -> None:
    # It wants the program to be there.
    program = shutil.which("true")
    text = re.sub(r"^ExecStart=\S+", f"ExecStart={program}", UNIT.read_text(), flags=re.MULTILINE)
    (tmp_path / UNIT.name).write_text(text.replace("KillMode=", "KillModes=" if wrong else "KillMode="))
    argv = ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    # It says what it does not understand, and calls it a success.
    about_ours = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert bool(about_ours) is wrong, done.stderr


def test_command_is_one_that_the_daemon_understands_and_its_directories_are_made(
    service: configparser.SectionProxy,
) -> None:
    program, command, *rest = shlex.split(service["ExecStart"])
    assert (Path(program).name, command) == ("udptun", "daemon")
    assert f"{Path(program).parent}/pip install" in (ROOT / "README.md").read_text()
    options = flags.parse_daemon_flags(rest, {})
    made = {Path("/run") / it for it in service["RuntimeDirectory"].split()}
    assert made == {options.run_dir, options.subnet_file.parent}
    assert Path("/var/lib") / service["StateDirectory"] == options.state_dir


def test_variables_that_the_unit_mentions_are_flags() -> None:
    named = dict(re.findall(r"(FLANNELD_\w+)=(\S+?)[,.]?(?=\s)", UNIT.read_text()))
    options = flags.parse_daemon_flags([], named)
    assert (options.store.kind, options.ip_masq, options.warnings) == (StoreKind.ETCD, True, ())


def test_datapath_and_its_sockets_outlive_the_daemon(service: configparser.SectionProxy) -> None:
    assert service["KillMode"] == "process"
    assert service["RuntimeDirectoryPreserve"] == "yes"


def test_all_processes_may_be_killed_and_packets_wait(service: configparser.SectionProxy) -> None:
    """A queue and a socket for each of 16 workers, 16 sockets to send from, five more; twice during a change."""
    assert int(service["FileDescriptorStoreMax"]) >= 2 * (16 + 16 + 16 + 5)
    assert service["Environment"] == f"FDSTORE={service['FileDescriptorStoreMax']}"
    assert service["OOMPolicy"] == "continue"
    assert float(service["RestartSec"]) <= 0.1
    assert int(service["WatchdogSec"]) > 0


@pytest.mark.parametrize(("status", "waits"), [("1", True), ("0", False), ("KILL", False), ("2", False)])
def test_next_start_waits_only_for_a_daemon_that_has_failed(
    service: configparser.SectionProxy, status: str, waits: bool
) -> None:
    program, *arguments = shlex.split(service["ExecStopPost"].replace("$$", "$").replace("sleep 2", "echo waits"))
    done = subprocess.run(
        [program, *arguments], env={"EXIT_STATUS": status}, check=True, capture_output=True, text=True, timeout=10
    )
    assert done.stdout == ("waits\n" if waits else "")


def test_daemon_is_not_started_again_with_a_configuration_that_a_person_has_to_mend(
    service: configparser.SectionProxy,
) -> None:
    assert service["Restart"] == "always"
    assert {int(service["RestartPreventExitStatus"])} == {UsageError.exit_status, ConfigError.exit_status}


def test_address_families_are_those_that_the_package_opens(service: configparser.SectionProxy) -> None:
    """`socket.socket(FAMILY, ...)` and its like in all that the daemon runs; iptables and nft need no others."""
    opened = set()
    for path in Path(udptun.__file__).parent.rglob("*.py"):
        if "lab" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "socket":
                opened |= set(re.findall(r"AF_\w+", ast.unparse(node)))
    allowed = set(service["RestrictAddressFamilies"].split())
    assert {"AF_UNIX", "AF_INET", "AF_NETLINK"} <= opened <= allowed
    # etcd and the API server may have an IPv6 address.
    assert allowed - opened <= {"AF_INET6"}


def test_unit_leaves_the_tun_device_and_the_settings_of_ours_alone() -> None:
    """PrivateDevices, DevicePolicy and ProtectClock take the device away, and ProtectKernelTunables the settings."""
    lines = UNIT.read_text().splitlines()
    assert {"DeviceAllow=/dev/net/tun rw", "BindPaths=-/dev/net/tun"} <= set(lines)
    (writable,) = (line.partition("=")[2].split() for line in lines if line.startswith("ReadWritePaths="))
    assert "-/proc/sys/net" in writable
    assert not [line for line in lines if line.startswith("PrivateNetwork=")]


def test_legacy_iptables_has_its_lock_though_all_is_read_only() -> None:
    """The lock is the host's, and a read-only /run lets nobody make it."""
    text = UNIT.read_text()
    assert re.search(r"^ExecStartPre=\+\S+/touch /run/xtables.lock$", text, re.M)
    assert re.search(r"^ReadWritePaths=.*-/run/xtables.lock\b", text, re.M)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_rates_the_units_exposure_at_2_or_better(figure: Callable[..., None]) -> None:
    argv = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", UNIT]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    (rating,) = re.findall(r"Overall exposure level for udptun.service: ([012]\.\d)", done.stdout)
    figure("exposure of the unit, of 10", float(rating))


def test_datapath_can_give_its_rights_up_under_the_units_filter() -> None:
    (*_, last) = re.findall(r"^SystemCallFilter=(.*)$", UNIT.read_text(), re.M)
    assert {"capset", "seccomp"} <= set(last.split())


def test_settings_of_the_host_exist() -> None:
    lines = [it for it in (SYSTEMD / "90-udptun.conf").read_text().splitlines() if it and not it.startswith("#")]
    values = {name.strip(): value.strip() for name, value in (line.split("=") for line in lines)}
    assert values == {"net.ipv4.ip_forward": "1", "net.ipv4.ping_group_range": "0 2147483647"}
    for name in values:
        assert Path("/proc/sys", *name.split(".")).exists()

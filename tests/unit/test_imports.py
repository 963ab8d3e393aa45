"""The import rule: pure modules import no shell, and each dependency has one owner."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import udptun
from udptun.daemon import open_store
from udptun.errors import ConfigError
from udptun.options import parse_daemon_flags

PACKAGE = Path(udptun.__file__).parent

PURE = [
    *(
        "allocate",
        "atomic_file",
        "config",
        "errors",
        "lease",
        "netstate",
        "offload",
        "options",
        "subnet_env",
        *("datapath.settings", "rtnetlink", "underlay"),
    ),
    *("backends.alloc", "backends.base", "backends.choice", "backends.hostgw"),
    *("backends.udp", "backends.vtep", "backends.vxlan"),
    "masq.rules",
]
SHELL = {
    "asyncio",
    "cffi",
    "fcntl",
    "google",
    "grpc",
    "numpy",
    "pyroute2",
    "pytun",
    "select",
    "socket",
    "sqlite3",
    "subprocess",
    "threading",
}
OWNERS = {
    "pyroute2": {"netlink.py"},
    "pytun": {"tun.py"},
    "grpc": {"stores/etcdrpc/client.py"},
    "google": {"stores/etcdrpc/client.py", "stores/etcdrpc/etcd_pb2.py"},
}


def imported(path: Path) -> set[str]:
    """Top-level names that the file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("module", PURE)
def test_pure_module_loads_no_shell(module: str) -> None:
    script = f"import sys, udptun.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert f"udptun.{module}" in loaded
    assert not SHELL.intersection(loaded)
    allowed = {
        "udptun",
        "udptun.backends",
        "udptun.datapath",
        "udptun.masq",
        "udptun.stores",
        "udptun.stores.base",
        *(f"udptun.{pure}" for pure in PURE),
    }
    assert {name for name in loaded if name.partition(".")[0] == "udptun"} <= allowed


def test_each_library_with_an_owner_is_imported_by_its_owner_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        for library in OWNERS.keys() & imported(path):
            assert str(path.relative_to(PACKAGE)) in OWNERS[library], f"{path} imports {library}"


def test_cli_alone_reads_argv_and_the_environment() -> None:
    """Besides the programs of their own: the datapath worker, and the lab with its namespace holder."""
    others = {PACKAGE / "cli.py", PACKAGE / "_kabi_build.py", PACKAGE / "datapath" / "worker.py"}
    for path in {*PACKAGE.rglob("*.py")} - others - {*(PACKAGE / "lab").rglob("*.py")}:
        for word in ("sys.argv", "os.environ", "os.getenv", "sys.exit"):
            assert word not in path.read_text(), f"{path} uses {word}"


def test_cli_starts_without_the_daemons_libraries() -> None:
    script = "import sys, udptun.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert SHELL.intersection(loaded) <= {"select"}
    assert "udptun.options" not in loaded


def test_daemon_loads_grpc_only_for_the_etcd_store() -> None:
    script = "import sys, udptun.daemon; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"grpc", "google", "udptun.stores.etcd"} & set(loaded)


def test_etcd_without_its_extra_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    for name in [name for name in sys.modules if name.startswith("udptun.stores.etcd")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"cannot use etcd: .*grpc.*: pip install 'udptun\[etcd\]'"):
        open_store(parse_daemon_flags(["--store=etcd"], {}))

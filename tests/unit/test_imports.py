"""The import rule: pure modules import no shell, and each dependency has one owner."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

import udptun
from udptun.config.flags import parse_daemon_flags
from udptun.core.errors import ConfigError
from udptun.stores.open import open_store

PACKAGE = Path(udptun.__file__).parent

FLOORS = (
    {"core", "cni"},
    {"config"},
    {"kernel", "probing"},
    {"stores", "firewall", "datapath"},
    {"membership"},
    {"backends"},
    {"control"},
    {"doctor"},
    {"commands"},
)
"""The folders from the ground up.  A module imports from its own folder and from lower floors.

The rooms of one floor do not know each other.  `lab` stands beside the house: it runs the commands in namespaces.
"""
PURE = {"core", "config"}
"""These touch the system through files alone."""
PURE_MODULES = [
    *("backends.alloc", "backends.base", "backends.choice", "backends.hostgw"),
    *("backends.udp", "backends.vtep", "backends.vxlan"),
    *("kernel.interfaces", "kernel.reconcile.change", "kernel.reconcile.plan", "kernel.rtnetlink", "kernel.underlay"),
    *("probing.beliefs", "probing.carrier", "probing.liveness", "probing.loss", "probing.path_mtu"),
    *("control.metrics.samples", "control.metrics.table", "control.metrics.text"),
    *("control.trace.checks",),
    *("datapath.learning", "datapath.restarts", "datapath.settings", "datapath.stranger_program"),
    *("firewall.iptables_form", "firewall.nft_form", "firewall.rules"),
    *(f"firewall.obstacles.{name}" for name in ("judge", "nft_messages", "nft_rules", "ruleset", "xtables")),
    *("membership.allocate", "membership.former", "membership.grace", "membership.identity"),
    *("stores.kube.annotations", "stores.kube.table"),
]
"""Modules of the other folders that decide and do nothing."""
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
    "pyroute2": {"kernel/link_messages.py"},
    "pytun": {"kernel/tun.py"},
    "grpc": {"stores/etcd/client.py"},
    "google": {"stores/etcd/client.py", "stores/etcd/etcd_pb2.py"},
    "numpy": {"datapath/bulk.py"},
    "lightkube": {"stores/kube/access.py"},
    "msgspec": {"stores/kube/node.py"},
    "h11": {"lab/kube_api/connection.py", "lab/kube_api/server.py", "stores/kube/http.py"},
    "sqlite3": {f"stores/local/{name}.py" for name in ("database", "rows", "store")},
}


def floor_of(folder: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if folder in rooms)


@pytest.fixture(scope="module")
def imports_of() -> Mapping[Path, Sequence[ast.AST]]:
    """Of each file of the package: its import statements, and where it takes a name from the module `ipaddress`."""

    def is_of_ipaddress(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ipaddress"

    return {
        path: [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom) or is_of_ipaddress(node)
        ]
        for path in PACKAGE.rglob("*.py")
    }


def imported(nodes: Sequence[ast.AST]) -> set[str]:
    """Top-level names that these import."""
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


def pure_modules() -> list[str]:
    folders = [path for folder in PURE for path in (PACKAGE / folder).rglob("*.py")]
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in folders]
    return sorted([name for name in names if not name.endswith("__init__")] + PURE_MODULES)


EXCEPTIONS = {("commands", "lab")}
"""`udptun lab` is a command; its code stands beside the house."""


def imported_of_ours(nodes: Sequence[ast.AST]) -> set[str]:
    """The folders of `udptun` that these import from."""
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    folders = {parts[1] for name in names if len(parts := name.split(".")) > 1 and parts[0] == "udptun"}
    return {folder for folder in folders if (PACKAGE / folder).is_dir()}


@pytest.fixture(scope="module")
def loaded_with() -> Mapping[str, list[str]]:
    """Pure module -> every module that is there when it is imported, with pure ones alone there before."""
    script = """if True:
        import os, sys
        shell, *names = sys.argv[1:]
        for name in names:
            if os.fork() == 0:
                __import__(name)
                print(name, *sys.modules, flush=True)
                os._exit(not sys.modules.keys().isdisjoint(shell.split(",")))
            if os.wait()[1] == 0:
                # Many modules import the same ones.
                __import__(name)
    """
    names = [f"udptun.{module}" for module in pure_modules()]
    command = [sys.executable, "-c", script, ",".join(SHELL), *names]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return {name: loaded for name, *loaded in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("module", pure_modules())
def test_pure_module_loads_no_shell(module: str, loaded_with: Mapping[str, list[str]]) -> None:
    loaded = loaded_with[f"udptun.{module}"]
    assert f"udptun.{module}" in loaded
    assert not SHELL.intersection(loaded)


def test_every_folder_has_a_floor() -> None:
    rooms = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE}
    assert rooms == set().union(*FLOORS) | {"lab"}


def test_module_imports_from_its_own_folder_and_from_lower_floors_only(
    imports_of: Mapping[Path, Sequence[ast.AST]],
) -> None:
    upward = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, nodes in imports_of.items()
        if (folder := path.relative_to(PACKAGE).parts[0]) != "lab" and path.parent != PACKAGE
        for name in imported_of_ours(nodes)
        if name != folder and (name == "lab" or floor_of(name) >= floor_of(folder)) and (folder, name) not in EXCEPTIONS
    ]
    assert not upward


def test_each_library_with_an_owner_is_imported_by_its_owner_only(
    imports_of: Mapping[Path, Sequence[ast.AST]],
) -> None:
    for path, nodes in imports_of.items():
        for library in OWNERS.keys() & imported(nodes):
            assert str(path.relative_to(PACKAGE)) in OWNERS[library], f"{path} imports {library}"


def test_text_of_others_is_read_by_ip_text_alone(imports_of: Mapping[Path, Sequence[ast.AST]]) -> None:
    """The functions of `ipaddress` take zones.  The other modules here give them what the kernel or host-local says."""
    owners = {"core/ip_text.py", "kernel/link_messages.py", "probing/host.py", "datapath/sockets.py"}
    owners |= {"cni/bridge.py", "cni/reservations.py"}
    functions = {"ip_address", "ip_network", "ip_interface"}
    found = set()
    for path, nodes in imports_of.items():
        if path.is_relative_to(PACKAGE / "lab"):
            continue
        for node in nodes:
            names = set[str]()
            if isinstance(node, ast.ImportFrom) and node.module == "ipaddress":
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute):
                names = {node.attr}
            if names & functions:
                found.add(str(path.relative_to(PACKAGE)))
    assert found == owners


def test_cli_alone_reads_argv_and_the_environment() -> None:
    """Besides the programs of their own: the datapath worker, the writer of a file, and those of the lab."""
    programs = ("commands/cli.py", "_kabi_build.py", "datapath/worker.py", "core/atomic_file.py", "cni/plugin.py")
    others = {PACKAGE / name for name in programs}
    for path in {*PACKAGE.rglob("*.py")} - others - {*(PACKAGE / "lab").rglob("*.py")}:
        for word in ("sys.argv", "os.environ", "os.getenv", "sys.exit"):
            assert word not in path.read_text(), f"{path} uses {word}"


def test_cli_starts_without_the_daemons_libraries() -> None:
    script = "import sys, udptun.commands.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert SHELL.intersection(loaded) <= {"select"}
    assert "udptun.config.flags" not in loaded


def test_status_loads_nothing_of_the_daemons_flags() -> None:
    """Before, it took its default for --run-dir from there: a quarter of its processor time."""
    script = """if True:
        import sys
        from udptun.commands import status
        from udptun.commands.parser import Parser

        Parser().add_run_dir({})
        print(*sys.modules)
    """
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "udptun.commands.screen" in loaded
    assert not {"udptun.config", "udptun.core.network_state"} & set(loaded)


def test_daemon_loads_grpc_only_for_the_etcd_store() -> None:
    script = "import sys, udptun.control.daemon; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"grpc", "google", "udptun.stores.etcd.store", "udptun.stores.etcd.client"} & set(loaded)


def test_daemon_loads_numpy_only_for_a_large_table() -> None:
    """Before, every daemon did at its start: 60 to 140 ms and 14 MB."""
    script = """if True:
        import sys, udptun.control.daemon
        from ipaddress import IPv4Address, IPv4Network
        from udptun.core.tunnel import SourceCheck
        from udptun.datapath.settings import PacketSettings, Remote
        from udptun.datapath.stats import MANY_PEERS, Stats
        from udptun.datapath.table import TableWriter

        subnets = list(IPv4Network("10.0.0.0/8").subnets(new_prefix=24))
        table, stats = TableWriter.create(), Stats.create()
        table.configure(
            PacketSettings(IPv4Network("10.0.0.0/8"), subnets[0], IPv4Address("192.0.2.1"), 1472, SourceCheck.PEER)
        )
        for n in (MANY_PEERS - 1, MANY_PEERS):
            for i in range(1, n + 1):
                table.set_peer(subnets[i], Remote(IPv4Address(i), 8285, True), 1472)
            assert table.publish(stats)
            stats.peers([table.index_of(subnet) for subnet in table.subnets])
            print("numpy" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_daemon_loads_what_every_run_needs_and_no_more() -> None:
    """Each of these costs milliseconds and up to 10 MB; before, a daemon had nearly all of them in memory."""
    script = (
        "import sys; from udptun.commands import cli; cli._import_asyncio_without_ssl()\n"
        "import udptun.control.daemon; print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    # OpenSSL (_ssl, _hashlib) and what some harmless module brings along.
    unused = {"_hashlib", "_ssl", "argparse", "bz2", "difflib", "email", "hashlib", "http.client", "lzma", "shutil"}
    # What only the backends with a datapath need.
    unused |= {"numpy", "pytun"}
    # What only who is scraped needs, and who judges the rules of others.
    unused |= {"udptun.control.metrics.text", "udptun.firewall.obstacles.ruleset"}
    assert not unused & set(loaded)


def test_ssl_is_there_for_whoever_asks_after_asyncio_was_imported_without() -> None:
    script = (
        "from udptun.commands import cli; cli._import_asyncio_without_ssl()\n"
        "import asyncio.sslproto; assert asyncio.sslproto.ssl is None; import ssl; ssl.create_default_context()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("store", "libraries"),
    [
        ("file:/nowhere", set()),
        ("local:/nowhere", {"sqlite3"}),
        pytest.param("etcd", {"grpc", "google"}, marks=pytest.mark.skipif(not find_spec("grpc"), reason="needs grpc")),
        pytest.param(
            "kube",
            {"h11", "lightkube", "msgspec"},
            marks=pytest.mark.skipif(not find_spec("lightkube"), reason="needs lightkube"),
        ),
    ],
)
def test_each_store_loads_its_own_library_and_only_when_it_is_opened(store: str, libraries: set[str]) -> None:
    script = (
        "import sys, udptun.membership.membership; from udptun.stores.open import open_store; print(*sys.modules)\n"
        "from udptun.config.flags import parse_daemon_flags\n"
        f"open_store(parse_daemon_flags(['--store={store}'], {{'NODE_NAME': 'n1'}})); print(*sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    known = {"sqlite3", "grpc", "google", "h11", "lightkube", "httpx2", "yaml", "msgspec"}
    before, after = (set(line.split()) & known for line in printed.splitlines())
    assert before == set()
    assert after == libraries


def test_etcd_without_its_extra_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    for name in [name for name in sys.modules if name.startswith("udptun.stores.etcd")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"cannot use etcd: .*grpc.*: pip install 'udptun\[etcd\]'"):
        open_store(parse_daemon_flags(["--store=etcd"], {}))


def test_kube_without_its_extra_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgspec", None)
    for name in [name for name in sys.modules if name.startswith("udptun.stores.kube")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"cannot use Kubernetes: .*msgspec.*: pip install 'udptun\[kube\]'"):
        open_store(parse_daemon_flags(["--store=kube"], {"NODE_NAME": "n1"}))


@pytest.mark.skipif(not find_spec("lightkube"), reason="needs lightkube")
def test_lightkube_asks_httpx2_for_nothing_but_what_stands_in_for_it() -> None:
    """Nor in functions.  When it fails with a new release of lightkube, `_Httpx2` has to have more."""
    from udptun.stores.kube import access

    there = access._Httpx2().__dict__.keys() | vars(access._Httpx2).keys()
    asked = set()
    for module in ("config.client_adapter", "config.kubeconfig", "config.models", "core.exceptions"):
        found = sys.modules[f"lightkube.{module}"]
        assert found.__file__ is not None
        for node in ast.walk(ast.parse(Path(found.__file__).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and "httpx" in node.value.id:
                asked.add(node.attr)
    assert {"Auth", "BasicAuth", "create_ssl_context"} <= asked <= there


@pytest.mark.skipif(not find_spec("lightkube"), reason="needs lightkube")
def test_a_lightkube_that_needs_more_of_httpx2_gets_the_real_one(tmp_path: Path) -> None:
    """Before, it got an empty exception for every name, and what it did with that was anybody's guess."""
    spec = find_spec("lightkube")
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, tmp_path / "lightkube", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "lightkube/config/client_adapter.py").open("a") as adapter:
        adapter.write("\nLIMITS = httpx.Limits(max_connections=7)\n")
    script = """if True:
        import asyncio, sys
        sys.path.insert(0, sys.argv[1])
        from udptun.stores.kube import access
        from udptun.stores.kube.http import Request
        auth = access.client_adapter.user_auth(access.User(token="t"))
        request = asyncio.run(anext(auth.async_auth_flow(Request("GET", "/", {}))))
        print(access.client_adapter.LIMITS.max_connections, "httpx2" in sys.modules, request.headers["Authorization"])
    """
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "7 True Bearer t\n"


@pytest.mark.skipif(not find_spec("lightkube"), reason="needs lightkube")
def test_the_kube_store_loads_neither_lightkubes_models_nor_its_own_client() -> None:
    script = "import sys, udptun.stores.kube.store; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "lightkube.config.client_adapter" in loaded
    assert [name for name in loaded if name.startswith(("lightkube.models", "lightkube.resources"))] == []
    assert not {"lightkube.core.async_client", "lightkube.core.client", "lightkube.core.generic_client"} & set(loaded)

"""Modules of a package without the package's `__init__`, and everybody else's view of that package."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from udptun.kernel.lean_import import import_without_init, stand_ins

PACKAGE = "udptun_test_package"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package with two modules; `__init__` counts its runs in a file and imports all."""
    root = tmp_path / PACKAGE
    root.mkdir()
    (root / "__init__.py").write_text(
        "import pathlib\n"
        "log = pathlib.Path(__file__).parent / 'runs'\n"
        "log.write_text((log.read_text() if log.exists() else '') + 'x')\n"
        f"from {PACKAGE}.small import VALUE\n"
        f"from {PACKAGE} import large\n"
        "__version__ = '1'\n"
    )
    (root / "small.py").write_text("VALUE = object()\n")
    (root / "large.py").write_text("VALUE = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield root
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


def runs(package: Path) -> int:
    """How often `__init__` has run."""
    return len((package / "runs").read_text()) if (package / "runs").exists() else 0


def loaded() -> set[str]:
    return {name.removeprefix(f"{PACKAGE}.") for name in sys.modules if name.startswith(f"{PACKAGE}.")}


def test_the_module_is_there_and_the_rest_of_the_package_is_not(package: Path) -> None:
    import_without_init(PACKAGE, "small")
    assert (runs(package), loaded()) == (0, {"small"})


def test_init_runs_once_when_somebody_asks_for_what_it_makes(package: Path) -> None:
    import_without_init(PACKAGE, "small")
    module = importlib.import_module(PACKAGE)
    assert module.__version__ == "1"
    assert module.VALUE is sys.modules[f"{PACKAGE}.small"].VALUE, "the module that was there already"
    assert (runs(package), loaded()) == (1, {"small", "large"})
    with pytest.raises(AttributeError, match="nowhere"):
        _ = module.nowhere
    assert runs(package) == 1


def test_another_module_of_the_package_needs_no_init(package: Path) -> None:
    import_without_init(PACKAGE, "small")
    scope: dict[str, object] = {}
    exec(f"from {PACKAGE} import large", scope)
    assert (runs(package), loaded()) == (0, {"small", "large"})


def test_a_package_that_is_there_already_stays_as_it_is(package: Path) -> None:
    module = importlib.import_module(PACKAGE)
    import_without_init(PACKAGE, "small")
    assert sys.modules[PACKAGE] is module
    assert runs(package) == 1


def test_a_module_that_cannot_do_without_init_is_imported_as_usual(package: Path) -> None:
    """It reads from the package what `__init__` sets only after it has imported that very module."""
    init = package / "__init__.py"
    init.write_text(f"STATE = {{}}\n{init.read_text()}assert STATE.pop('small')\n")
    (package / "small.py").write_text(f"import {PACKAGE}\n{PACKAGE}.STATE['small'] = VALUE = 1\n")
    import_without_init(PACKAGE, "small")
    assert sys.modules[f"{PACKAGE}.small"].VALUE == 1
    assert sys.modules[PACKAGE].STATE == {}
    assert loaded() == {"small", "large"}


def test_what_is_missing_is_an_import_error_as_usual(package: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"{PACKAGE}.nowhere"):
        import_without_init(PACKAGE, "nowhere")
    with pytest.raises(AttributeError):
        _ = importlib.import_module(PACKAGE).nowhere
    import_without_init("udptun_no_such_package", "anything")


def test_an_init_that_fails_fails_for_everybody_who_asks(package: Path) -> None:
    (package / "__init__.py").write_text("raise RuntimeError('broken')\n")
    import_without_init(PACKAGE, "small")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            _ = sys.modules[PACKAGE].VALUE


@pytest.mark.parametrize("first", ["", "import pyroute2"])
def test_links_are_decoded_with_all_of_pyroute2_and_with_a_twentieth(first: str) -> None:
    """A message that was written is read again, whether somebody has imported pyroute2 before us or not."""
    script = f"""
import sys
{first}
from udptun.core.network_state import Link, Vxlan
from udptun.kernel.link_messages import add_vxlan, decode_link
print("pyroute2.iproute" in sys.modules)
vxlan = Vxlan(1, None, 2, 8472, learning=False, gbp=True)
link = decode_link(add_vxlan("flannel.1", vxlan, "02:00:00:00:00:01", 1450).body)
assert (link.name, link.mtu, link.mac, link.vxlan.port, link.vxlan.gbp) == (
    "flannel.1", 1450, "02:00:00:00:00:01", 8472, True
), link
from pyroute2 import IPRoute, __version__
assert sys.modules["pyroute2.iproute"].IPRoute is IPRoute
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(bool(first))]


def test_a_module_stands_in_for_one_that_is_not_loaded_and_only_in_the_block(package: Path) -> None:
    small = ModuleType(f"{PACKAGE}.small")
    small.__dict__["VALUE"] = 3
    with stand_ins(small, ModuleType("sys")):
        import_without_init(PACKAGE, "small")
        assert sys.modules[f"{PACKAGE}.small"] is small
    assert isinstance(sys.modules["sys"].path, list), "it was loaded before"
    assert importlib.import_module(f"{PACKAGE}.small").VALUE is not small.VALUE

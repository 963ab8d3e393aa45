"""`udptun cni install` and `udptun cni gc`: files in one step, plugins that fit together, leftovers by hand."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.cni_plugin import IPV4_ENV, NAME, FakeDelegate, Plugin, installed
from udptun.cni import install
from udptun.cni.errors import CniError
from udptun.cni.state import boot_id
from udptun.commands import cni
from udptun.core.errors import UdptunError

CONFLIST = {
    "name": "cbr0",
    "cniVersion": "0.3.1",
    "plugins": [
        {"type": "flannel", "delegate": {"hairpinMode": True, "isDefaultGateway": True}},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}


def plugin_that_says(path: Path, *versions: str, status: int = 0) -> None:
    """A plugin that knows these versions."""
    answer = json.dumps({"cniVersion": versions[-1], "supportedVersions": versions}) if versions else "?"
    path.write_text(f"#!/bin/sh\necho '{answer}'\nexit {status}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory with what flannel's configuration needs: ours, and the rest as in Debian 12."""
    directory = tmp_path / "bin"
    installed(directory)
    for name in ("bridge", "host-local", "portmap"):
        plugin_that_says(directory / name, "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0")
    return directory


def test_plugin_is_installed_in_one_step_and_left_alone_when_it_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "flannel"
    assert install.install(str(tmp_path), "flannel", install.launcher()) == f"installed {path}"
    assert path.stat().st_mode & 0o777 == 0o755
    before = path.stat()
    assert install.install(str(tmp_path), "flannel", install.launcher()) == f"{path} is there already"
    # Reading it moves st_atime.
    after = path.stat()
    for field in ("st_ino", "st_mtime_ns", "st_ctime_ns"):
        assert getattr(after, field) == getattr(before, field)
    # A runtime that runs the old one is not disturbed: it is another file.
    with path.open() as running:
        install.install(str(tmp_path), "flannel", install.launcher() + b"\n")
        assert os.fstat(running.fileno()).st_nlink == 0
    assert [it.name for it in tmp_path.iterdir()] == ["flannel"]
    path.chmod(0o644)
    assert install.install(str(tmp_path), "flannel", install.launcher() + b"\n") == f"installed {path}"
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"#!/bin/sh\nexit 3\n", "does not say its CNI versions: status 3"),
        (b"#!/bin/sh\necho hello\n", "does not say its CNI versions: status 0, 'hello'"),
        (b"#!/bin/sh\necho '{\"supportedVersions\": 1}'\n", "does not say its CNI versions: status 0"),
        (b"#!/nowhere/python\n", "cannot run "),
    ],
)
def test_program_that_does_not_run_here_never_takes_the_old_ones_place(
    tmp_path: Path, program: bytes, message: str
) -> None:
    old = installed(tmp_path).read_bytes()
    with pytest.raises(CniError, match=message):
        install.install(str(tmp_path), "flannel", program)
    assert (tmp_path / "flannel").read_bytes() == old
    assert [it.name for it in tmp_path.iterdir()] == ["flannel"]


def test_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CniError, match=f"cannot install {tmp_path}/none/flannel: No such file or directory"):
        install.install(str(tmp_path / "none"), "flannel", install.launcher())


def test_configuration_lists_the_versions_that_all_plugins_know(programs: Path) -> None:
    conf = install.check_conflist(json.dumps(CONFLIST).encode(), [str(programs)])
    versions = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0"]
    assert conf == {**CONFLIST, "cniVersions": versions}
    for name in ("bridge", "host-local", "portmap"):
        plugin_that_says(programs / name, "0.4.0", "1.0.0", "1.1.0")
    conf = install.check_conflist(json.dumps(CONFLIST).encode(), [str(programs)])
    assert (conf["cniVersion"], conf["cniVersions"]) == ("1.1.0", ["0.4.0", "1.0.0", "1.1.0"])


@pytest.mark.parametrize(
    ("gone", "changes", "message"),
    [
        (["portmap", "host-local"], {}, "the plugins host-local, portmap are in none of "),
        ([], {"plugins": [{"type": "flannel", "delegate": {"type": "ptp"}}]}, "the plugin ptp is in none of "),
        (["flannel"], {}, "the plugin flannel is in none of .*`udptun cni install /.*` for ours$"),
        ([], {"plugins": []}, "the configuration has no plugins"),
        ([], {"plugins": [{}]}, "a plugin of the configuration has no type"),
    ],
)
def test_plugin_that_the_host_lacks_is_named(
    programs: Path, gone: list[str], changes: dict[str, Any], message: str
) -> None:
    for name in gone:
        (programs / name).unlink()
    with pytest.raises(CniError) as caught:
        install.check_conflist(json.dumps(CONFLIST | changes).encode(), [str(programs)])
    assert re.search(message, f"{caught.value.message}; {caught.value.details}")


def test_plugins_without_a_common_version_are_named(programs: Path) -> None:
    plugin_that_says(programs / "portmap", "9.0.0")
    with pytest.raises(CniError, match=r"no CNI version is common to all plugins: flannel: .*; portmap: 9\.0\.0"):
        install.check_conflist(json.dumps(CONFLIST).encode(), [str(programs)])


def test_command_installs_plugin_and_configuration(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "10-flannel.conflist", tmp_path / "net.d.conflist"
    source.write_text(json.dumps(CONFLIST))
    words = ["install", str(programs), "--conflist", str(source), "--to", str(target)]
    assert cni.run(words, {}) == 0
    assert capsys.readouterr().out == f"{programs}/flannel is there already\nwrote {target}\n"
    assert json.loads(target.read_text())["cniVersions"][-1] == "1.0.0"
    assert cni.run(words, {}) == 0
    assert capsys.readouterr().out == f"{programs}/flannel is there already\n{target} is there already\n"
    (programs / "bridge").unlink()
    target.unlink()
    with pytest.raises(UdptunError, match=r"the plugin bridge is in none of .*; install the CNI plugins"):
        cni.run(words, {})
    assert not target.exists()


def test_command_frees_what_containers_that_are_gone_have_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = Plugin(tmp_path, installed(tmp_path / "programs"))
    plugin.subnet_file.write_text(IPV4_ENV)
    delegate = FakeDelegate(plugin)
    ipam = {"ipam": {"dataDir": str(tmp_path / "networks")}}
    for name in ("dead", "living"):
        plugin.run("ADD", name, conf=ipam).result()
        (tmp_path / "networks" / NAME).mkdir(parents=True, exist_ok=True)
        (tmp_path / "networks" / NAME / f"10.1.17.{len(name)}").write_text(f"{name}\r\neth0")
    (tmp_path / "networks" / NAME / "10.1.17.77").write_text("nobody")
    extras = plugin.data_dir / ".udptun" / "dead"
    extras.write_text(extras.read_text().replace(boot_id(), "of an earlier boot"))
    conf = tmp_path / "net.conflist"
    shared = {"name": NAME, "cniVersion": "1.0.0"}
    member = {key: value for key, value in (plugin.conf | ipam).items() if key != "name"}
    conf.write_text(json.dumps({**shared, "plugins": [{"type": "portmap"}, member]}))
    environ = {"CNI_PATH": str(tmp_path / "bin"), **os.environ}
    assert cni.run(["gc", "--conf", str(conf)], environ) == 0
    # The delegate's DEL would have given its address back.
    assert capsys.readouterr().out.splitlines() == [
        "deleted the attachment of container dead",
        f"network {NAME}: 1 freed, 1 containers and 3 addresses stay",
    ]
    assert cni.run(["gc", "--unknown", "--conf", str(conf)], environ) == 0
    assert capsys.readouterr().out.splitlines() == [
        "freed the address 10.1.17.4 of container dead",
        "freed the address 10.1.17.77 of container nobody",
        f"network {NAME}: 2 freed, 1 containers and 1 addresses stay",
    ]
    assert delegate.calls == ["ADD", "ADD", "DEL"]
    delegate.fail("DEL", message="no luck")
    extras = plugin.data_dir / ".udptun" / "living"
    extras.write_text(extras.read_text().replace(boot_id(), "of an earlier boot"))
    with pytest.raises(UdptunError, match="failed to delegate del: no luck"):
        cni.run(["gc", "--conf", str(conf), "--path", str(tmp_path / "bin")], dict(os.environ))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "cni: the following arguments are required: install|gc"),
        (["install"], "cni install: the following arguments are required: DIR"),
        (["gc", "--conf", "/nowhere"], "cannot read /nowhere: No such file or directory"),
        (["install", "/tmp", "--file", "/nowhere"], "cannot read /nowhere: No such file or directory"),
    ],
)
def test_bad_arguments_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UdptunError) as error:
        cni.run(words, {})
    assert str(error.value) == message


def test_gc_without_a_network_of_type_flannel_says_so(tmp_path: Path) -> None:
    conf = tmp_path / "x.conflist"
    conf.write_text(json.dumps({"name": "x", "plugins": [{"type": "bridge"}]}))
    with pytest.raises(UdptunError, match=f"no network of type flannel in {conf}; --conf FILE names the one to use"):
        cni.run(["gc", "--conf", str(conf)], {})

"""`udptun man`: manual pages that man(1) shows, with what --help says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from udptun.commands import cli
from udptun.config.flags import FLAGS


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, "-m", "udptun", "man", "--all", str(directory)], check=True)
    return directory


def test_each_command_and_each_action_with_a_help_of_its_own_has_a_page(pages: Path) -> None:
    names = {path.name for path in pages.iterdir()}
    assert {f"udptun-{name}.8" for name in cli._COMMANDS} < names
    assert {"udptun.8", "udptun-lab-up.8", "udptun-cni-gc.8", "udptun-lease-init.8", "udptun-config-check.8"} < names
    assert "udptun-lease-list.8" not in names


def test_the_daemons_page_has_every_flag_with_its_help(pages: Path) -> None:
    text = (pages / "udptun-daemon.8").read_text().replace("\\-", "-")
    for flags in FLAGS.values():
        for flag in flags:
            assert re.search(rf"^\\fB--{flag.name}\\fR.*\n\S", text, re.MULTILINE), flag.name
            assert flag.help in text


def status_of(page: Path) -> dict[str, str]:
    """What each exit status means."""
    _, _, section = page.read_text().replace("\\-", "-").partition(".SH EXIT STATUS\n")
    return dict(re.findall(r"^\.B (\d)\n(.*)$", section, re.MULTILINE))


def test_each_page_says_what_the_exit_status_means_there(pages: Path) -> None:
    """That of trace did not say that 1 is a packet that would be dropped, that of config check nothing of its 2."""
    assert "would be dropped" in status_of(pages / "udptun-trace.8")["1"]
    for name in ("udptun-config.8", "udptun-config-check.8"):
        assert "warnings" in status_of(pages / name)["1"]
        assert "the daemon would refuse the file" in status_of(pages / name)["2"]
    for name in ("udptun-doctor.8", "udptun-lab-doctor.8"):
        assert (status_of(pages / name)["1"][:8], status_of(pages / name)["2"][:6]) == ("warnings", "errors")
    for name in ("udptun-mesh.8", "udptun-lab-mesh.8"):
        assert status_of(pages / name)["0"] == "nothing is wrong"
    assert status_of(pages / "udptun-lease.8")["1"] == "failed"
    assert all(list(status_of(page)) == ["0", "1", "2"] for page in pages.iterdir())


@pytest.mark.skipif(shutil.which("man") is None, reason="needs man")
def test_man_shows_a_page(pages: Path) -> None:
    shown = subprocess.run(
        ["man", "-l", str(pages / "udptun-lease.8")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LC_ALL": "C", "MANPAGER": "cat", "MANWIDTH": "130"},
    )
    assert shown.stderr == ""
    assert "udptun lease reserve SUBNET|KEY --public-ip IP|--public-ipv6 IP [--port N] [FLAG...]" in shown.stdout
    for heading in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "ETCD", "EXIT STATUS", "SEE ALSO"):
        assert f"\n{heading}\n" in shown.stdout


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="needs mandoc")
def test_mandoc_finds_nothing_wrong(pages: Path) -> None:
    """But for the date: a page that is made of the help has none."""
    lint = ["mandoc", "-T", "lint", "-W", "warning", *map(str, pages.iterdir())]
    lines = subprocess.run(lint, capture_output=True, text=True).stdout.splitlines()
    assert [line for line in lines if "missing date" not in line] == []


def test_what_is_no_command_and_what_cannot_be_written_is_said() -> None:
    def said(*argv: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-m", "udptun", "man", *argv], capture_output=True, text=True)
        return done.returncode, done.stderr

    assert said("daemno") == (2, "udptun: error: man: there is no command daemno (udptun --help lists the commands)\n")
    assert said("--all", "/nowhere")[0] == 1

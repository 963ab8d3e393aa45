"""`udptun completion`: what the shells offer is what --help says; asked in a real bash."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from start_undone import start_undone

from udptun.commands import cli, completion
from udptun.commands.help_pages import Page, read_page, read_pages
from udptun.config.flags import FLAGS

ALL_FLAGS = [f"--{flag.name}" for flags in FLAGS.values() for flag in flags]


@pytest.fixture(scope="module")
def pages() -> Mapping[tuple[str, ...], Page]:
    with start_undone(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        return read_pages(cli._help_of)


def names(page: Page) -> list[str]:
    return [name for it in page.options for name in it.names]


# --- pages


def test_pages_have_every_command_every_action_and_every_flag(pages: Mapping[tuple[str, ...], Page]) -> None:
    assert list(pages[()].actions) == list(cli._COMMANDS)
    assert names(pages[("daemon",)]) == ALL_FLAGS
    assert {"--all", "--cni-bin-dir", *ALL_FLAGS} <= set(names(pages[("doctor",)]))
    assert list(pages[("lease",)].actions) == ["list", "show", "reserve", "release", "init"]
    assert list(pages[("config",)].actions) == ["check", "show"]
    assert list(pages[("cni",)].actions) == ["install", "gc"]
    assert {"up", "exec", "status", "doctor", "mesh", "down"} <= pages[("lab",)].actions.keys()
    assert list(pages[("completion",)].actions) == list(completion.SHELLS)
    assert {"--hosts", "--net-conf", "--daemon"} <= set(names(pages[("lab", "up")]))
    assert names(pages[("health",)]) == ["--live", "--ready", "--run-dir"]
    assert {it.help for it in pages[("daemon",)].options} > {"masquerade what leaves the overlay"}


def test_a_page_tells_usage_text_actions_and_flags_apart() -> None:
    text = (
        "usage: udptun x a [--json]\n       udptun x b FILE\n\nWhat it does.\n\na    the first\nb    the second\n"
        "other words\n  --json\n        for programs\n\n"
        "Topic one:\n  -f, --file FILE  a file\n  --dir DIR\n        where\n\nEnd.\n"
    )
    page = read_page(("x",), text)
    assert page.usage == ["udptun x a [--json]", "udptun x b FILE"]
    assert page.actions == {"a": "the first", "b": "the second"}
    assert [(it.names, it.value, it.help, it.topic) for it in page.options] == [
        (("--json",), "", "for programs", ""),
        (("-f", "--file"), "FILE", "a file", "Topic one"),
        (("--dir",), "DIR", "where", "Topic one"),
    ]
    assert [it.takes_file for it in page.options] == [False, True, False]
    assert page.options[2].takes_directory
    assert "other words" in page.text
    assert "End." in page.end


# --- bash


@pytest.fixture(scope="module")
def bash(pages: Mapping[tuple[str, ...], Page], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    path = tmp_path_factory.mktemp("completion") / "udptun"
    path.write_text(completion.script("bash", pages))
    return path


def offered(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    command = (
        'source "$0" && COMP_WORDS=("$@") && COMP_CWORD=$(($# - 1)) && { _udptun; printf "%s\\n" "${COMPREPLY[@]}"; }'
    )
    done = subprocess.run(
        ["bash", "-uc", command, str(script), *words], capture_output=True, text=True, check=True, cwd=script.parent
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_takes_the_script_for_both_programs(bash: Path) -> None:
    done = subprocess.run(
        ["bash", "-euc", 'source "$0"; complete -p udptun flanneld', str(bash)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "complete -o default -F _udptun udptun\ncomplete -o default -F _udptun flanneld\n"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["udptun", ""], list(cli._COMMANDS)),
        (["udptun", "daem"], ["daemon"]),
        (["udptun", "daemon"], ["daemon"]),
        (["udptun", "daemon", "--iface-"], ["--iface-regex", "--iface-can-reach"]),
        (["udptun", "daemon", "--mtu", "1400", "--ip-masq-"], ["--ip-masq-fully-random-disable"]),
        (["flanneld", "--healthz-"], ["--healthz-ip", "--healthz-port"]),
        (["/opt/bin/flanneld", "--ip-masq", "--kube-s"], ["--kube-subnet-mgr"]),
        (["udptun", "lease", ""], ["list", "show", "reserve", "release", "init"]),
        (["udptun", "lease", "init", "--"], ["--help", "--force"]),
        (["udptun", "lab", "up", "--under"], ["--underlay-mtu"]),
        (["udptun", "completion", "z"], ["zsh"]),
        (["udptun", "config", "check", ""], []),
        (["udptun", "nothing", "--"], []),
    ],
)
def test_bash_offers_commands_actions_and_flags(bash: Path, words: list[str], wanted: list[str]) -> None:
    assert offered(bash, *words) == wanted


def test_bash_offers_files_directories_and_interfaces_as_values(bash: Path) -> None:
    (bash.parent / "a.json").touch()
    (bash.parent / "a-dir").mkdir(exist_ok=True)
    for words in (["--net-config-path", "a"], ["--net-config-path", "=", "a"]):
        assert sorted(offered(bash, "udptun", "daemon", *words)) == ["a-dir", "a.json"]
    assert offered(bash, "udptun", "daemon", "--run-dir", "a") == ["a-dir"]
    assert offered(bash, "udptun", "daemon", "--run-dir", "=") == ["a-dir"]
    assert "lo" in offered(bash, "udptun", "daemon", "--iface", "l")


# --- zsh and fish


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_have_every_command_and_flag(shell: str, pages: Mapping[tuple[str, ...], Page]) -> None:
    text = completion.script(shell, pages)
    for page in pages.values():
        for name in names(page):
            assert re.search(rf"{re.escape(name)}\b" if shell == "zsh" else rf"-[ls] {name.lstrip('-')} ", text), name
        for action in page.actions:
            assert re.search(rf"\b{action}\b", text)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_can_read_the_script(
    shell: str, pages: Mapping[tuple[str, ...], Page], tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "script").write_text(completion.script(shell, pages))
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


# --- the command


def test_completion_is_printed_and_what_is_no_shell_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with start_undone():
        assert cli._run("udptun", ["completion", "fish"], {}) == 0
    assert "complete -c udptun" in capsys.readouterr().out
    assert cli._run("udptun", ["completion", "tcsh"], {}) == 2
    assert "one of bash, zsh, fish" in capsys.readouterr().err

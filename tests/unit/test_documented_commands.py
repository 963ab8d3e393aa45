"""What tests/page_commands.py says of the commands of the pages is so, and their words are those that parsers know.

test_docs.py has the test that each command is run or named with the reason.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Mapping

import pytest
import yaml
from etcd_server import GRANT
from page_commands import ELSEWHERE, IN_SENTENCES, ROOT, Command, all_commands, commands, pages, programs_missed
from start_undone import start_undone

from bench.__main__ import main as bench_main
from deploy.render import render
from udptun.commands import cli
from udptun.commands.help_pages import Page, read_pages
from udptun.config.flags import parse_daemon_flags

COMMANDS = all_commands()
SPANS = [
    (page.name, " ".join(span.split()))
    for page in pages()
    for span in re.findall(r"`((?:udptun|flanneld|\./dev|python -m|\.venv/bin/python -m) [^`]+)`", page.read_text())
]
"""Commands in sentences and tables, each with its page."""

NO_COMMANDS = {
    "udptun <Network>",
    "udptun on this node is not ready: …",
    "udptun on this node is not ready: … (since 12 s)",
}


def test_commands_in_sentences_that_are_run_stand_there() -> None:
    for page, examples in IN_SENTENCES.items():
        spans = {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", (ROOT / page).read_text())}
        assert examples.keys() - spans == set(), page


def test_no_command_is_overlooked_for_the_name_of_its_program() -> None:
    missed = [line for page in pages() for line in programs_missed(page)]
    assert missed == [], "are these commands? put their programs into PROGRAMS or NO_PROGRAMS of tests/page_commands.py"


def test_commands_are_found_with_what_the_page_says_they_print() -> None:
    found = {it.text: it for it in COMMANDS if it.page == "docs/doctor.md"}
    assert list(found) == ["udptun doctor"]
    assert found["udptun doctor"].shown[0].startswith("error    forwarding: net.ipv4.ip_forward is 0")
    assert found["udptun doctor"].has_prompt
    (long,) = (it for it in commands(ROOT / "docs/operations.md") if "--etcd-prefix /blue" in it.text)
    assert long.text.endswith("--state-dir /var/lib/udptun-blue --subnet-file /run/flannel/blue.env …")


def named_tests() -> set[tuple[str, str]]:
    every = {test for texts in ELSEWHERE.values() for it in texts.values() for test in it.tests}
    every |= {"netns/test_page_commands.py::test_commands_of_the_page_do_what_it_says"}
    return {(file, name) for file, _, name in (test.partition("::") for test in every)}


@pytest.mark.parametrize(("file", "name"), sorted(named_tests()))
def test_named_test_exists(file: str, name: str) -> None:
    source = ast.parse((ROOT / "tests" / file).read_text())
    assert name in {it.name for it in source.body if isinstance(it, ast.FunctionDef)}


# ----------------------------------------------------------------------------------------- words that parsers know


@pytest.fixture(scope="module")
def help_pages() -> Mapping[tuple[str, ...], Page]:
    with start_undone(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        return read_pages(cli._help_of)


def flags_of(text: str) -> list[str]:
    """Of the first program in the line, without their values."""
    return [
        re.split(r"[=\]]", word.strip("[]"))[0] for word in text.split(" | ")[0].split() if re.match(r"\[?--\w", word)
    ]


def unknown_words(text: str, pages: Mapping[tuple[str, ...], Page]) -> list[str]:
    """The command, action or flags of udptun in the line that its help does not have."""
    words: tuple[str, ...] = ()
    rest = text.split()[1:]
    while rest and rest[0] in pages[words].actions and (*words, rest[0]) in pages:
        words += (rest.pop(0),)
    if not words and rest and rest[0] not in pages[()].actions:
        return [rest[0]]
    if words[:2] == ("lab", "exec"):
        return []
    known = {"--help"} | {name for n in range(len(words) + 1) for it in pages[words[:n]].options for name in it.names}
    usage = " ".join(line for n in range(len(words) + 1) for line in pages[words[:n]].usage)
    return [flag for flag in flags_of(" ".join(rest)) if flag not in known and flag not in usage]


def test_commands_and_flags_of_udptun_are_those_of_its_help(help_pages: Mapping[tuple[str, ...], Page]) -> None:
    assert unknown_words("udptun status --never", help_pages) == ["--never"]
    assert unknown_words("udptun stauts", help_pages) == ["stauts"]
    lines = [
        (it.page, part) for it in COMMANDS for part in re.findall(r"(?:^(?:\S*/)?|\| |\()(udptun [^|;&)]+)", it.text)
    ]
    lines += [span for span in SPANS if span[1].startswith("udptun ") and span[1] not in NO_COMMANDS]
    assert len(lines) > 150
    assert [(page, text, words) for page, text in lines if (words := unknown_words(text, help_pages))] == []


def daemons() -> Iterator[Command]:
    yield from (it for it in COMMANDS if re.search(r"(?:^|/| )(?:udptun daemon|flanneld) --", it.text))


@pytest.mark.parametrize("command", list(daemons()), ids=lambda it: re.sub(r"\W+", "_", it.text)[:60])
def test_daemon_takes_the_flags_and_has_nothing_to_say_of_them(command: Command) -> None:
    words = [it for it in shlex.split(command.text) if it != "…"]
    environ = {}
    while "=" in words[0]:
        name, _, environ[name] = words.pop(0).partition("=")
    is_flanneld = words[0].endswith("flanneld")
    given = parse_daemon_flags(words[1 if is_flanneld else 2 :], environ, as_flanneld=is_flanneld)
    assert given.warnings == ()


def test_dev_and_bench_know_the_words_that_the_pages_give_them(capsys: pytest.CaptureFixture[str]) -> None:
    known = set(re.findall(r"^    ([a-z]+)\)$", (ROOT / "dev").read_text(), re.MULTILINE))
    assert {"demo", "test", "bench"} <= known
    lines = [text for _, text in SPANS if text.startswith("./dev ")] + [it.text for it in COMMANDS]
    lines = [text for text in lines if text.startswith("./dev ")]
    assert {text.split()[1] for text in lines} <= known
    for text in lines:
        _, what, *rest = text.split()
        if what == "bench":
            action = [word for word in rest[:1] if word.islower() and word.isalpha()]
            with pytest.raises(SystemExit) as end:
                bench_main([*action, "--help"])
            help_text = capsys.readouterr().out
            assert end.value.code == 0
            assert [flag for flag in flags_of(text) if flag not in help_text] == [], text


def test_modules_that_the_pages_run_exist_and_know_their_flags() -> None:
    lines = [text for _, text in SPANS] + [it.text for it in COMMANDS]
    lines = [text.partition("python -m ")[2] for text in lines if "python -m " in text and "-m venv" not in text]
    assert len(lines) > 5
    for text in lines:
        module, *rest = text.split()
        place = ROOT / module.replace(".", "/")
        sources = [*place.rglob("*.py")] if place.is_dir() else [place.with_suffix(".py")]
        source = "".join(path.read_text() for path in sources)
        assert source, text
        assert [flag for flag in flags_of(" ".join(rest)) if f'"{flag}"' not in source] == [], text


def test_rights_in_etcd_are_given_as_the_page_says_and_nothing_else_is() -> None:
    (command,) = (it.text for it in COMMANDS if "grant-permission" in it.text)
    assert command.split() == ["etcdctl", *GRANT, "/coreos.com/network"]


def test_values_of_the_helm_command_make_the_chart_that_the_page_says() -> None:
    (command,) = (it.text for it in COMMANDS if it.text.startswith("helm "))
    chart, namespace = re.search(r"install udptun (\S+) --namespace (\S+)", command).groups()  # type: ignore[union-attr]
    assert (ROOT / chart / "Chart.yaml").exists()
    values = dict(word.split("=") for word in re.findall(r"--set (\S+)", command))
    objects = list(yaml.safe_load_all(render({key: yaml.safe_load(value) for key, value in values.items()}, namespace)))
    assert {it["kind"] for it in objects} >= {"DaemonSet", "ConfigMap"}
    # The page makes it before, with a label.
    assert "Namespace" not in {it["kind"] for it in objects}
    (conf,) = (it for it in objects if it["kind"] == "ConfigMap")
    assert f'"Network": "{values["podCidr"]}"' in conf["data"]["net-conf.json"]

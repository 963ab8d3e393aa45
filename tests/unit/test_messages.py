"""docs/messages.md has every line that the daemon logs at level info and above, and no other."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import udptun

PACKAGE = Path(udptun.__file__).parent
PAGE = PACKAGE.parent / "docs" / "messages.md"

if not PAGE.exists():
    pytest.skip("the pages are in the repository, not in an installed package", allow_module_level=True)

LEVELS = {"info": "info", "warning": "warning", "error": "error", "exception": "error"}
PLACEHOLDER = re.compile(r"%(?:(%)|[-+#0 ]*\d*(?:\.\d+)?[A-Za-z])")

SHOWN_AS: Mapping[str, tuple[str, ...]] = {
    "underlay … iface=… address=… public_ip=… mtu=… reason=… others=…": (
        "underlay chosen iface=… address=… public_ip=… mtu=… reason=… others=…",
        "underlay changed iface=… address=… public_ip=… mtu=… reason=… others=…",
    ),
    "peer … subnet=… public_ip=…": ("peer added subnet=… public_ip=…", "peer removed subnet=… public_ip=…"),
    "…: …": ("peer … leases … for …, this node carries …: …",),
    "resolved: …": ("resolved: peer … leases … for …, this node carries …",),
    "…, … error=…": ("no network config, … error=…", "no lease, … error=…", "lease store unavailable, … error=…"),
    "…, beginning with the table of the last run error=…": (
        "no network config, beginning with the table of the last run error=…",
        "no lease, beginning with the table of the last run error=…",
    ),
}
"""Messages that the page has with a value or two filled in, so that a reader finds them."""

MADE_ELSEWHERE: Mapping[tuple[str, str], str] = {
    ("control/daemon.py", "warning"): "what was given and is ignored",
    ("control/daemon.py", "options.store_warning"): "what was given and is ignored",
    ("control/daemon.py", "problem"): "why the daemon has ended",
    ("control/daemon.py", "line"): "problem lines",
    ("control/hand_over.py", "line"): "taking over: …",
    ("control/health_port.py", "problem"): "problem lines",
    ("control/mesh/port.py", "problems[address]"): "problem lines",
    ("control/http.py", "line"): "too many http clients, …",
    ("control/settings.py", "note"): "what the network config has and nobody reads",
    (
        "control/tunnelled.py",
        "self._not_refused or 'packets from all addresses of this host are refused again'",
    ): "packets from all addresses of this host are refused again",
    ("datapath/carrier.py", "exc"): "what the kernel was asked and refused",
    ("datapath/learner.py", "text"): "learned address forgotten: not proved again for … s",
    ("datapath/shortcut/detour.py", "self.problem"): "problem lines",
    ("datapath/strays.py", "lines[pair]"): "problem lines",
    ("datapath/supervision.py", "*self._dying"): "problem lines",
    ("datapath/supervision.py", "_stopped_line(process)"): "problem lines",
    ("kernel/problem_lines.py", "line"): "problem lines",
    ("kernel/problem_lines.py", "self._all_well"): "problem lines",
    ("membership/doubles.py", "line"): "problem lines",
    ("membership/membership.py", "line"): "reservations and former subnets that were not taken",
    ("probing/prober.py", "self._dead_line(subnet, self._probing.dead_since().get(subnet, self._now_s()))"): (
        "problem lines"
    ),
}
"""Lines whose whole text is made elsewhere, by where and of what they are logged -> the entry of the page."""

LEARNED = {
    "peer sends from an address beside its PublicIP, as it has proved subnet=… public_ip=… address=… port=…",
    "learned address forgotten: not proved again for … s subnet=… public_ip=… address=…",
}
"""What datapath/learner.py logs by a method of its own."""


@dataclass(frozen=True, slots=True)
class Message:
    """`text` has … for each value; None: it is made elsewhere, of `source`."""

    module: str
    level: str
    text: str | None
    source: str


@functools.cache
def messages() -> tuple[Message, ...]:
    """Those of the package at level info and above, but for those of the lab and the doctor, which are no daemons."""
    modules = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
    return tuple(
        found
        for module, path in modules.items()
        if not module.startswith(("lab/", "doctor/"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and (found := message_of(module, node))
    )


def message_of(module: str, call: ast.Call) -> Message | None:
    function = call.func
    if isinstance(function, ast.Name) and function.id == "ProblemLines":
        return of_argument(module, "info", call.args[1:])
    if not isinstance(function, ast.Attribute) or ast.unparse(function.value) not in ("log", "self._log"):
        return None
    if function.attr == "log":
        return of_argument(module, "info or warning", call.args[1:])
    if function.attr == "debug":
        return None
    return of_argument(module, LEVELS[function.attr], call.args)


def of_argument(module: str, level: str, args: list[ast.expr]) -> Message:
    if not isinstance(args[0], ast.Constant):
        return Message(module, level, None, ast.unparse(args[0]))
    template = str(args[0].value)
    if template == "%s":
        return Message(module, level, None, ast.unparse(args[1]))
    return Message(module, level, PLACEHOLDER.sub(lambda match: match[1] or "…", template), "")


def entries(heading: str = "") -> list[tuple[str, str, str]]:
    """Level, message and what is said of it, of each entry of the page; before or after `Lines with a text ...`."""
    own, _, elsewhere = PAGE.read_text().partition("\n## Lines with a text of their own\n")
    found = []
    for entry in re.split(r"^\* ", elsewhere if heading else own, flags=re.MULTILINE)[1:]:
        line = " ".join(entry.partition("\n\n")[0].split())
        pattern = r"(info or warning|\w+) \((.+?)\): (.*)" if heading else r"(\w+) (?:``(.+?)``|`(.+?)`): (.*)"
        match = re.fullmatch(pattern, line)
        assert match is not None, line
        level, *messages, what = match.groups()
        found.append((level, next(filter(None, messages)), what))
    return found


ENTRIES = {(level, message): what for level, message, what in entries()}
ELSEWHERE = {message: level for level, message, _ in entries("elsewhere")}


def test_page_has_each_message_of_the_code_with_its_level() -> None:
    texts = {(it.level, it.text) for it in messages() if it.text is not None}
    wanted = {(level, text) for level, it in texts for text in SHOWN_AS.get(it, (it,))}
    assert len(wanted) > 90
    assert wanted - ENTRIES.keys() == set(), "give each an entry in docs/messages.md: cause, and remedy"
    stale = ENTRIES.keys() - wanted - {("info", it) for it in LEARNED}
    assert stale == set(), "no code logs these any more: take them out of docs/messages.md"


def test_page_has_each_kind_of_line_that_is_made_elsewhere() -> None:
    there = {(it.module, it.source) for it in messages() if it.text is None}
    assert there == MADE_ELSEWHERE.keys()
    named = set(MADE_ELSEWHERE.values()) - {"learned address forgotten: not proved again for … s"}
    assert named == ELSEWHERE.keys()
    for text in LEARNED:
        assert text.partition(" subnet=")[0].partition(" …")[0] in (PACKAGE / "datapath" / "learner.py").read_text()


def test_each_warning_and_error_has_a_cause_and_a_remedy() -> None:
    without = [
        message for (level, message), what in ENTRIES.items() if level != "info" and "*Remedy:* " not in what[10:]
    ]
    assert without == []
    assert all(len(what) > 5 for what in ENTRIES.values())


def test_each_message_is_a_constant_whose_fields_differ_and_are_none_of_the_logs_own() -> None:
    """--log-format=json makes a key of each field."""
    for it in messages():
        names = re.findall(r"\b(\w+)=…", it.text or "")
        assert len(set(names)) == len(names), it
        assert not {"time", "level", "logger", "message", "exception"}.intersection(names), it

"""An examination as text for people and as JSON for programs.  Pure."""

from __future__ import annotations

import json
from collections import Counter

from udptun import __version__
from udptun.core.errors import one_line
from udptun.core.line_breaks import broken
from udptun.doctor.checks import CHECKS, PROBLEM_LINES, Examination
from udptun.doctor.finding import Severity

SCHEMA = 1
"""Of the JSON document.  Keys are only ever added."""

_COLOURS = {Severity.ERROR: "\33[1;31m", Severity.WARNING: "\33[1;33m", Severity.NOTE: "\33[36m"}
_SHOWN = 10
"""Findings of one check: a host that is cut off has one for each peer."""
_WORD = 9
"""Columns of the word that a line begins with."""
_GREEN, _DIM, _PLAIN = "\33[32m", "\33[2m", "\33[0m"


def as_text(it: Examination, *, with_all: bool, with_colour: bool, width: int | None = None) -> str:
    """Problems first, two lines each, and a summary at the end.  `with_all`: all of them, and what is fine.

    On a terminal of `width` columns longer lines are broken between words; None: none is.
    """
    lines = []
    counts = Counter(name for name, _ in it.findings)
    shown: Counter[str] = Counter()
    for name, finding in it.findings:
        shown[name] += 1
        if shown[name] > _SHOWN and not with_all:
            continue
        colour = _COLOURS[finding.severity] if with_colour else ""
        subject = f"{finding.subject}: " if finding.subject and finding.subject not in finding.cause else ""
        lines += _entry(f"{name}: {subject}{finding.cause}", width, finding.severity.word, colour)
        lines += _entry(f"-> {finding.remedy}", width, indent="   ")
        if shown[name] == _SHOWN < counts[name] and not with_all:
            lines.append(f"         ... and {counts[name] - _SHOWN} more of {name} (--all shows them)")
    if with_all:
        lines += _others(it, with_colour, width)
    return "\n".join([*lines, *([""] if lines else []), _summary(it, with_all)]) + "\n"


def _entry(text: str, width: int | None, word: str = "", colour: str = "", indent: str = "") -> list[str]:
    """`text` behind the word that its line begins with; further lines stand below it, `indent` deeper."""
    first, *more = [text] if width is None else broken(text, max(width - _WORD, 30), indent)
    word = word.ljust(_WORD - 1)
    return [f"{f'{colour}{word}{_PLAIN}' if colour else word} {first}", *(" " * _WORD + row for row in more)]


def _others(it: Examination, with_colour: bool, width: int | None) -> list[str]:
    wrong = {name for name, _ in it.findings}
    lines = []
    for name, looks_at in (*((check.name, check.looks_at) for check in CHECKS), (PROBLEM_LINES, _OF_THE_DAEMON)):
        if name in it.not_looked_at:
            text = f"{name}: not looked at: {it.not_looked_at[name]}"
            lines += _entry(text, width, "-", _DIM if with_colour else "")
        elif name not in wrong:
            lines += _entry(f"{name}: {looks_at.replace('`', '')}", width, "ok", _GREEN if with_colour else "")
        if name == _ENDPOINTS:
            lines += [line for endpoint in it.endpoints for line in _entry(str(endpoint), width)]
    return lines


_ENDPOINTS = "store-endpoints"
_OF_THE_DAEMON = "what the daemon says is wrong"


def _summary(it: Examination, with_all: bool) -> str:
    counts = Counter(finding.severity for _, finding in it.findings)
    words = [_count(counts[severity], severity.word) for severity in reversed(Severity) if counts[severity]]
    skipped = ""
    if n := len(it.not_looked_at):
        skipped = f"; {n} {'does' if n == 1 else 'do'} not apply here" + ("" if with_all else " (--all says why)")
    return f"{it.n_checks} checks, {it.peers} asked: {', '.join(words) or 'nothing wrong'}{skipped}"


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'s' if n > 1 else ''}"


def as_json(it: Examination) -> str:
    """One line; docs/doctor.md says what it has."""
    wrong = {name for name, _ in it.findings}
    names = (*(check.name for check in CHECKS), PROBLEM_LINES)
    return json.dumps(
        {
            "schema": SCHEMA,
            "version": __version__,
            "exit_status": it.exit_status,
            "peers": it.peers,
            "findings": [
                {
                    "severity": finding.severity.word,
                    "check": name,
                    "subject": finding.subject,
                    "cause": finding.cause,
                    "remedy": finding.remedy,
                }
                for name, finding in it.findings
            ],
            "fine": [name for name in names if name not in wrong and name not in it.not_looked_at],
            "not_looked_at": it.not_looked_at,
            "store_endpoints": [
                {
                    "endpoint": endpoint.name,
                    "latency_ms": None if endpoint.latency_s is None else round(1000 * endpoint.latency_s, 1),
                    "error": one_line(endpoint.error),
                }
                for endpoint in it.endpoints
            ],
        }
    )

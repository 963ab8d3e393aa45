"""docs/troubleshooting.md: its entries quote what the program says, and each check of the doctor has one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from test_messages import ENTRIES, PLACEHOLDER

import udptun
from udptun.core.counter_words import COUNTERS
from udptun.doctor.checks import CHECKS

PACKAGE = Path(udptun.__file__).parent
PAGE = PACKAGE.parent / "docs" / "troubleshooting.md"
TEXT = PAGE.read_text()
CHECK_NAMES = {check.name for check in CHECKS}


@dataclass(frozen=True)
class Entry:
    """`said` are the code spans of its beginning, up to the colon; `what` is the rest: cause and remedy."""

    symptom: str
    said: tuple[str, ...]
    what: str


def entries() -> Iterator[Entry]:
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        symptom, _, body = section.partition("\n")
        for item in re.findall(r"^\* (.*(?:\n  .*)*)", body, re.MULTILINE):
            line = " ".join(item.split())
            spans = re.findall(r"`([^`]+)`", line)
            head, colon, what = re.sub(r"`[^`]+`", "`", line).partition(": ")
            assert colon, line
            yield Entry(symptom, tuple(spans[: head.count("`")]), what)


ALL = list(entries())


def templates(quotes: set[str]) -> set[str]:
    """Texts in the source of the package, with … for their values: of those modules that have the words of a quote."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        if not any(all(word in source for word in re.findall(r"\w+", quote)) for quote in quotes):
            continue
        tree = ast.parse(source)
        parts = {id(part) for it in ast.walk(tree) if isinstance(it, ast.JoinedStr) for part in it.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(it.value) if isinstance(it, ast.Constant) else "…" for it in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                found.add(PLACEHOLDER.sub(lambda match: match[1] or "…", node.value))
    return found


def test_what_the_entries_quote_is_said_by_the_program() -> None:
    metrics = set(re.findall(r"\*\*`(\w+)`\*\*", (PAGE.parent / "metrics.md").read_text()))
    names = {"udptun status"} | CHECK_NAMES | COUNTERS.keys() | metrics
    logged = {message for _, message in ENTRIES}
    quotes = {quote.strip("… ") for entry in ALL for quote in entry.said if quote not in names}
    assert len(quotes) > 30
    not_logged = {it for it in quotes if not any(it in text for text in logged)}
    texts = templates(not_logged)
    unknown = {it for it in not_logged if not any(it in text for text in texts)}
    assert unknown == set(), "no part of udptun says this: quote what it says now"


def test_each_check_of_the_doctor_belongs_to_a_symptom() -> None:
    named = {name for entry in ALL for name in entry.said}
    assert CHECK_NAMES - named == set(), "give the check an entry under the symptom that a user sees"


def test_each_entry_has_a_cause_and_a_remedy() -> None:
    assert len(ALL) > 60
    assert [entry for entry in ALL if not re.match(r".{5,} \*Remedy:\* .+\W$", entry.what)] == []
    # What is meant is said by name: a doctor's check, a counter, or the words.
    assert [entry for entry in ALL if not entry.said and entry.symptom != "After a change from flanneld, or back"] == []


def test_the_page_begins_with_all_of_its_symptoms() -> None:
    listed = re.findall(r"^\* \[([^]]+)\]\(#", TEXT, re.MULTILINE)
    headings = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert listed == headings[:-1]
    assert headings[-1] == "None of these"


def test_readers_find_the_page_from_where_they_begin() -> None:
    root = PAGE.parents[1]
    for page in ("README.md", "docs/doctor.md", "docs/messages.md", "docs/kubernetes.md", "docs/operations.md"):
        assert re.search(r"\]\((?:docs/)?troubleshooting\.md", (root / page).read_text()), page

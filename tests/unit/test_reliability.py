"""docs/reliability.md: each promise has tests or commands that exist and print figures, and those are committed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
RESULTS = sorted((ROOT / "tests" / "results").glob("*.txt"))
if not RESULTS:
    pytest.skip("the results are in the repository, not in an sdist", allow_module_level=True)

N_PROMISES = 22


def rows(heading: str) -> list[list[str]]:
    """The cells of the table behind the heading, without its head."""
    text = PAGE.read_text().partition(heading)[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def sources() -> dict[str, list[str]]:
    """By the number of the promise: the tests, as FILE::FUNCTION, and commands.  Files are those below tests/."""
    found: dict[str, list[str]] = {}
    for number, source in rows("## Which test prints it"):
        found.setdefault(number, []).extend(re.findall(r"`([^`]+)`", source))
    return found


TESTS = [(number, it) for number, named in sources().items() for it in named if "::" in it]
COMMANDS = [(number, it) for number, named in sources().items() for it in named if "::" not in it]


def test_each_promise_has_target_figures_and_what_prints_them() -> None:
    promises = {row[0]: row for row in rows("# Reliability") if row[0]}
    assert list(promises) == [str(number) for number in range(1, N_PROMISES + 1)]
    assert all(all(row) and len(row) == 5 for row in promises.values())
    assert sources().keys() == promises.keys()


@pytest.mark.parametrize(("number", "test"), TESTS)
def test_named_test_exists_prints_figures_and_was_run(number: str, test: str) -> None:
    name, _, function = test.partition("::")
    (source,) = (ROOT / "tests").rglob(name)
    defined = {
        node.name: node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert function in defined
    called = {node.func.id for node in ast.walk(defined[function]) if is_call_of_a_name(node)}
    assert called & {"figure", "print"}
    assert any(function in result.read_text() for result in RESULTS), "its figures are not in tests/results"


def is_call_of_a_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


@pytest.mark.parametrize(("number", "command"), COMMANDS)
def test_named_command_exists(number: str, command: str) -> None:
    module, *words = command.removeprefix("python -m ").split()
    places = (ROOT / module.replace(".", "/") / "__main__.py", ROOT / f"{module.replace('.', '/')}.py")
    (source,) = [place for place in places if place.exists()]
    for word in words:
        if word.islower() and word.isalpha():
            assert f'"{word}"' in source.read_text()

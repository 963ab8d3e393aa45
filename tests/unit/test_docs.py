"""Pages fit 120 columns, and what they say of the repository is so: paths, names, links, copied figures."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_commands import ELSEWHERE, RUN, all_commands

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--", *patterns], capture_output=True, text=True, check=True
    )
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).exists()]


if not (ROOT / ".git").exists():
    pytest.skip("the pages are checked in the repository, not in an sdist", allow_module_level=True)
try:
    PAGES = tracked("*.md")
except (OSError, subprocess.CalledProcessError) as exc:
    pytest.skip(f"cannot ask git for the pages: {exc}", allow_module_level=True)

GENERATED = ("bench/results/", "tests/results/", "udptun/stores/etcd/etcd_pb2")
"""Written by programs, or records of runs of another day."""

_SUFFIXES = "py|pyi|pyx|pxd|h|c|md|proto|toml"
_FILE = re.compile(rf"[\w.-]+(?:/[\w.-]+)*\.(?:{_SUFFIXES})")
_PLACEHOLDER = re.compile(r"(?:FILE|OLD|NEW)[.-]")
_FOLDER = re.compile(r"(?:udptun|bench|docs|tests|deploy)/(?:[\w.-]+/)*")

OLD_NAMES = re.compile(
    r"udptun[./]masq|\bmasq/|\bnetstate\b|\betcdrpc\b|(?<!test_)\blease_cli\b|\b_reference\b"
    r"|udptun[./]options\b|\boptions\.py|udptun[./]csrc|\b_(?:segment|coalesce|sys|wire)\.pxd"
    r"|datapath[./]client\b|udptun[./](?:cleanup|cli|clock|daemon|errors|forwarding|http|lease|offload|probe|reconcile"
    r"|rtnetlink|status|subnet_env|tun|underlay|underlay_watch|allocate|atomic_file|notify|state)(?:\.py\b| import|$)"
)
"""Modules as they were called before a folder said what they may touch."""


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_page_fits_120_columns(page: Path) -> None:
    wide = [f"{i}: {line[:60]}" for i, line in enumerate(page.read_text().splitlines(), 1) if len(line) > 120]
    assert wide == []


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_path_of_the_repository_that_a_page_names_exists(page: Path) -> None:
    gone = [name for name, folders in paths_named_by(page) if not any((folder / name).exists() for folder in folders)]
    assert gone == []


def paths_named_by(page: Path) -> Iterator[tuple[str, list[Path]]]:
    """Files and folders in backticks, and whatever links lead to; each with the folders it may be relative to.

    Under a heading that names a folder in backticks, a path may also be relative to that folder.
    """
    section = page.parent
    for line in page.read_text().splitlines():
        if line.startswith("#") and (found := re.search(r"`((?:udptun|bench|docs|tests)/[\w/]*)`", line)):
            section = ROOT / found[1]
        elif line.startswith("## "):
            section = page.parent
        for code in re.findall(r"`([^`]+)`", line):
            if (_FILE.fullmatch(code) and not _PLACEHOLDER.match(code)) or _FOLDER.fullmatch(code):
                yield code, [ROOT, ROOT / "udptun", page.parent, section]
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", line):
            if "://" not in target:
                yield target, [page.parent]


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_link_to_a_heading_leads_to_one(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text())
    gone = [
        f"{to}#{anchor}"
        for to, anchor in links
        if "://" not in to and anchor not in anchors(page.parent / to if to else page)
    ]
    assert gone == []


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def lines_of_all_files() -> Iterator[tuple[str, str]]:
    """Place and text of each line that a person wrote, but for this file's own."""
    for path in tracked():
        name = str(path.relative_to(ROOT))
        if path.suffix not in (".svg", ".json") and path != Path(__file__) and not name.startswith(GENERATED):
            yield from ((f"{name}:{i}", line) for i, line in enumerate(path.read_text().splitlines(), 1))


def test_no_file_names_a_module_as_it_was_called_before_the_folders() -> None:
    assert [f"{place}: {line.strip()[:80]}" for place, line in lines_of_all_files() if OLD_NAMES.search(line)] == []


def test_every_full_path_of_the_repository_in_any_file_exists() -> None:
    full = re.compile(rf"(?<![\w/.-])(?:udptun|bench|docs|tests)/[\w./-]*\.(?:{_SUFFIXES})\b")
    named = [(place, name) for place, line in lines_of_all_files() for name in full.findall(line)]
    assert len(named) > 50
    assert [f"{place}: {name}" for place, name in named if not (ROOT / name).exists()] == []


def test_each_decision_has_the_next_number_and_says_it_in_its_title() -> None:
    """Two decisions of one day once had the same number."""
    pages = sorted(path for path in PAGES if path.parent.name == "decisions" and path.stem[0].isdigit())
    assert [page.stem.split("-")[0] for page in pages] == [f"{at:04}" for at in range(1, len(pages) + 1)]
    for page in pages:
        assert page.read_text().startswith(f"# {page.stem.split('-')[0]}: "), page


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports them by their names alone, and then takes none of the two directories."""
    names = [path.name for path in tracked("tests/**/test_*.py")]
    assert len(names) > 100
    assert {name for name in names if names.count(name) > 1} == set()


def test_every_command_of_the_pages_is_run_or_named_with_the_reason() -> None:
    shown = {(it.page, it.text) for it in all_commands() if not (it.page == "docs/guide.md" and it.has_prompt)}
    run = {(page, text) for page, examples in RUN.items() for text in examples}
    elsewhere = {(page, text) for page, texts in ELSEWHERE.items() for text in texts}
    assert len(shown) > 60
    assert shown - run - elsewhere == set(), "give each an entry in RUN or ELSEWHERE of tests/page_commands.py"
    assert (run | elsewhere) - shown == set(), "these are on no page any more: take them out"
    assert run & elsewhere == set()


# --- docs/architecture.md


def rows_under(heading: str) -> list[list[str]]:
    """Cells of the tables between the heading and the next one of the same rank, without their heads."""
    text = ARCHITECTURE.read_text()
    section = text.split(f"\n{heading}\n")[1].split(f"\n{heading.split()[0]} ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    return [
        row for i, row in enumerate(rows) if "---" not in row[0] and (i + 1 == len(rows) or "---" not in rows[i + 1][0])
    ]


def names_in(source: Path) -> set[str]:
    """What the file defines, methods and fields with their class in front; of C and Cython every word that is in it."""
    if source.suffix != ".py":
        return set(re.findall(r"\w+", source.read_text()))

    def of(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from of(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                yield from (prefix + name for name in names_of(node))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield prefix + node.target.id

    return set(of(ast.parse(source.read_text()).body, ""))


def test_every_place_and_name_of_where_is_exists() -> None:
    rows = rows_under("## Where is …")
    assert len(rows) >= 9
    missing = []
    for what, places, names in rows:
        sources = [ROOT / place for place in re.findall(r"`([^`]+)`", places)]
        assert sources, what
        missing += [f"{what}: {source}" for source in sources if not source.exists()]
        defined = set().union(*(names_in(source) for source in sources if source.is_file()))
        missing += [f"{what}: {name}" for name in re.findall(r"`([^`]+)`", names) if name not in defined]
    assert missing == []


def test_packet_walk_names_functions_of_the_fast_path() -> None:
    walk = ARCHITECTURE.read_text().split("\n## A packet's way\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", walk))
    assert len(named) >= 10
    assert named - set().union(*map(names_in, tracked("udptun/_fastpath.pyx", "udptun/fastpath/*.pxd"))) == set()


def test_floors_are_those_that_the_import_test_holds_the_code_to() -> None:
    shown = {folder.strip("`"): int(floor) for floor, folder, *_ in rows_under("## The house")}
    source = ast.parse((ROOT / "tests" / "unit" / "test_imports.py").read_text())
    (floors,) = (node.value for node in source.body if isinstance(node, ast.Assign) and names_of(node) == ["FLOORS"])
    rooms: tuple[set[str], ...] = ast.literal_eval(floors)
    assert shown == {f"udptun/{room}/": floor for floor, there in enumerate(rooms, 1) for room in there}


def names_of(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def test_module_table_has_one_line_for_each_module_and_no_other() -> None:
    listed: list[str] = []
    for section in re.split(r"^### ", ARCHITECTURE.read_text(), flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if folder := re.search(r"`(udptun/[\w/]*)`", heading):
            names = re.findall(r"^\| ((?:`[\w./]+`(?:, )?)+) \|", text.partition("\n## ")[0], re.MULTILINE)
            listed += [folder[1] + name for cell in names for name in re.findall(r"`([^`]+)`", cell)]
    modules = [
        str(path.relative_to(ROOT))
        for path in tracked("udptun/*.py", "udptun/*.pyx", "udptun/*.pxd", "udptun/*.h", "udptun/*.proto")
        if path.name != "__init__.py" and not path.stem.endswith("_pb2")
    ]
    assert set(modules) - set(listed) == set(), "give each a line under Modules in docs/architecture.md"
    assert set(listed) - set(modules) == set(), "take these out of docs/architecture.md"
    assert len(listed) == len(modules)


# --- docs/performance.md


def test_performance_page_quotes_the_goals_of_a_committed_report() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    quoted = [
        line for line in page.partition("## Goals")[2].splitlines() if line.startswith("| ") and "---" not in line
    ]
    reports = [path.read_text().splitlines() for path in tracked("bench/results/*.md")]
    assert len(quoted) > 10
    assert any(set(quoted) <= set(report) for report in reports)

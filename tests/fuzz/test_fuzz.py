"""A short run of each target of `python -m tests.fuzz`; the long ones are a command of their own (CONTRIBUTING.md)."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.corpus_cover import smallest_cover
from tests.fuzz.mutate import MANY_DIGITS, json_mutator
from tests.fuzz.oracles import check_line
from tests.fuzz.table import CORPUS, LONGEST_INPUT, TARGETS, Target

ROOT = Path(__file__).parents[2]
CPU_SECONDS = 5
NEW_INPUTS_S = 0.2
"""Processor time for each target."""
GUIDED_S = 2
CORPUS_BYTES = 300_000


def run(*arguments: str) -> str:
    """`python -m tests.fuzz`, which has to find nothing."""
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing found" in done.stdout
    return done.stdout + done.stderr


def need(target: Target) -> None:
    missing = [name for name in target.needs if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")


@pytest.mark.timeout(600)
def test_random_flows_find_nothing_with_address_sanitizer() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    run("--cpu-seconds", str(CPU_SECONDS))


@pytest.mark.timeout(600)
def test_inputs_that_coverage_leads_to_find_nothing() -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed")
    said = run("--target", "lease", "--cpu-seconds", str(GUIDED_S))
    # Without instrumented code nothing would lead anywhere.
    assert " cov: " in said
    assert "NEW " in said


@pytest.mark.parametrize("name", TARGETS)
def test_kept_and_new_inputs_break_no_promise(name: str) -> None:
    """The corpus, and what becomes of it by chance."""
    target = TARGETS[name]
    need(target)
    module = target.load()
    inputs = [*target.corpus(), *module.SEEDS]
    for data in inputs:
        module.check(data)
    seed = time.time_ns()
    random = Random(seed)
    until_s = time.process_time() + NEW_INPUTS_S
    while time.process_time() < until_s:
        data = random.choice(inputs)
        for _ in range(random.randint(1, 4)):
            data = module.mutate(data, random)[:LONGEST_INPUT]
        try:
            module.check(data)
        except BaseException:
            print(f"found with the seed {seed}; for FOUND: {json.dumps(data.decode('latin-1'))}")
            raise


def found_cases() -> list[object]:
    """(target, what happened before it was mended), without the modules that this machine lacks."""
    cases = []
    for target in TARGETS.values():
        if all(importlib.util.find_spec(name.partition(".")[0]) for name in target.needs):
            cases += [pytest.param(target.name, words, id=f"{target.name}: {words}") for words in target.load().FOUND]
    return cases


@pytest.mark.parametrize(("name", "words"), found_cases())
def test_what_was_found_once_is_not_found_again(name: str, words: str) -> None:
    """Each broke a promise of its target before it was mended; `words` say what happened."""
    module = TARGETS[name].load()
    module.check(module.FOUND[words])


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) < CORPUS_BYTES
    assert {path.stem for path in CORPUS.iterdir()} <= TARGETS.keys()


def test_a_mutation_of_json_is_mostly_json_and_always_the_same() -> None:
    mutate = json_mutator(("a", "b"), (7,))
    first = [mutate(b'{"a": [1, {"b": "x"}], "b": null}', Random(i)) for i in range(300)]
    assert first == [mutate(b'{"a": [1, {"b": "x"}], "b": null}', Random(i)) for i in range(300)]
    assert len(set(first)) > 150

    def is_json(data: bytes) -> bool:
        try:
            json.loads(data.replace(MANY_DIGITS.encode(), b"9"))
        except (ValueError, RecursionError):
            return False
        return True

    assert sum(map(is_json, first)) > 270
    assert mutate(b"no json", Random(1)) != b"no json"


@pytest.mark.parametrize("line", ["", "a\nb", "\x1b[31m", "\ud800", "x" * 10_000])
def test_the_oracle_knows_what_is_not_one_line(line: str) -> None:
    with pytest.raises(AssertionError):
        check_line(line)
    check_line("cannot read café: no such file")


def test_the_corpus_keeps_the_shortest_inputs_that_reach_everything() -> None:
    module = TARGETS["files"].load()
    long, short = b"env\nFLANNEL_SUBNET=x,yy\n", b"env\nFLANNEL_SUBNET=x,y\n"
    kept = smallest_cover(module.check, [long, short, module.SEEDS[-1]])
    assert short in kept
    assert long not in kept
    assert module.SEEDS[-1] in kept

"""Result files: read, written whole, and what stands beside them.

A result is JSON with one line for each run, so that a reader finds a run with grep and a diff shows it as one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.errors import BenchError

SCHEMA = 3

_READABLE = (2, SCHEMA)
"""In schema 2 a run also has its command, what the measuring programs said, and `error`: null where all is well."""


def load(file: Path) -> Mapping[str, Any]:
    """The document in `file`.  Raises BenchError when it is none of ours."""
    try:
        document = json.loads(file.read_text())
    except OSError as exc:
        raise BenchError(f"cannot read {file}: {exc.strerror}") from exc
    except ValueError as exc:
        raise BenchError(f"{file} is not JSON: {exc}") from exc
    if not isinstance(document, dict) or document.get("schema") not in _READABLE:
        raise BenchError(f"{file} is not a result of this bench: its `schema` is none of {_READABLE}")
    return document


def save(document: Mapping[str, Any], file: Path) -> None:
    """Write `document`; `file` is whole at every moment.  Raises BenchError."""
    _write(file, _text(document))


def _text(document: Mapping[str, Any]) -> str:
    """`document` as JSON, a line for each key and each run.  Floats keep every digit."""
    runs = ",\n".join(f"  {_one_line(run)}" for run in document["runs"])
    lines = [f" {_one_line(key)}: {_one_line(value)}" for key, value in document.items() if key != "runs"]
    lines.append(f' "runs": [\n{runs}\n ]' if runs else ' "runs": []')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_beside(file: Path, contents: Mapping[str, str]) -> list[Path]:
    """Write files with the name of `file` but for its suffix: "-rtt.svg" -> content.  Raises BenchError."""
    written = []
    for suffix, content in contents.items():
        written.append(file.with_name(file.stem + suffix))
        _write(written[-1], content)
    return written


def _one_line(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _write(file: Path, content: str) -> None:
    beside = file.with_name(file.name + ".new")
    try:
        beside.write_text(content)
        beside.replace(file)
    except OSError as exc:
        raise BenchError(f"cannot write {file}: {exc.strerror}; name another file") from exc

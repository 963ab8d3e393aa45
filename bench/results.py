"""Result files: read, written whole, and what stands beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.errors import BenchError

SCHEMA = 2


def load(file: Path) -> Mapping[str, Any]:
    """The document in `file`.  Raises BenchError when it is none of ours."""
    try:
        document = json.loads(file.read_text())
    except OSError as exc:
        raise BenchError(f"cannot read {file}: {exc.strerror}") from exc
    except ValueError as exc:
        raise BenchError(f"{file} is not JSON: {exc}") from exc
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise BenchError(f"{file} is not a result of this bench: its `schema` is not {SCHEMA}")
    return document


def save(document: Mapping[str, Any], file: Path) -> None:
    """Write `document`; `file` is whole at every moment.  Raises BenchError."""
    _write(file, json.dumps(document, indent=1) + "\n")


def write_beside(file: Path, contents: Mapping[str, str]) -> list[Path]:
    """Write files with the name of `file` but for its suffix: "-rtt.svg" -> content.  Raises BenchError."""
    written = []
    for suffix, content in contents.items():
        written.append(file.with_name(file.stem + suffix))
        _write(written[-1], content)
    return written


def _write(file: Path, content: str) -> None:
    beside = file.with_name(file.name + ".new")
    try:
        beside.write_text(content)
        beside.replace(file)
    except OSError as exc:
        raise BenchError(f"cannot write {file}: {exc.strerror}; name another file") from exc

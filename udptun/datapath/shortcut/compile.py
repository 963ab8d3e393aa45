"""Makes bytecode.json of shortcut.bpf.c, for developers: `./dev bytecode`, which needs clang.

What is shipped is the file that is committed, whoever builds the package.  A test compiles again and compares.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "shortcut.bpf.c"
BYTECODE = Path(__file__).parent / "bytecode.json"

_ELF = struct.Struct("<16xHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQ")
_RELOCATIONS = 9
"""SHT_REL."""
INSTRUCTION_LEN = 8
_PER_LINE = 6
"""Instructions, so that a change shows few lines of difference."""


def source_hash() -> str:
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


def compiler() -> str:
    """The compiler and its major version.  Raises FileNotFoundError where there is none."""
    said = subprocess.run(["clang", "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"version (\d+)", said)
    return f"clang {version[1] if version else '?'}"


def compile_source() -> dict[str, Any]:
    """The document that bytecode.json holds.

    Of each program: the instructions in hexadecimal, and of each map which of them load it.
    """
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "shortcut.o")
        # The headers of the C library and of the kernel ask for asm/types.h, which is the machine's.
        headers = f"/usr/include/{sysconfig.get_config_var('MULTIARCH')}"
        options = ["-O2", "-target", "bpf", "-mcpu=v2", "-Wall", "-Wextra", "-Werror", "-I", headers]
        subprocess.run(["clang", *options, "-c", str(SOURCE), "-o", str(output)], check=True)
        programs = _programs(output.read_bytes())
    return {"source_sha256": source_hash(), "compiler": compiler(), "programs": programs}


def _programs(elf: bytes) -> dict[str, Any]:
    *_, at_sections, _flags, _size, _, _, each, n, names_index = _ELF.unpack_from(elf)
    sections = [_SECTION.unpack_from(elf, at_sections + i * each) for i in range(n)]

    def contents(index: int) -> bytes:
        _, _, _, _, offset, size, *_ = sections[index]
        return elf[offset : offset + size]

    def name_at(table: bytes, at: int) -> str:
        return table[at : table.index(b"\0", at)].decode()

    names = [name_at(contents(names_index), section[0]) for section in sections]
    found: dict[str, Any] = {}
    for index, name in enumerate(names):
        if name.startswith("tc/"):
            code = contents(index)
            step = _PER_LINE * INSTRUCTION_LEN
            lines = [code[at : at + step].hex() for at in range(0, len(code), step)]
            found[name.removeprefix("tc/")] = {"code": lines, "maps": {}}
    for index, section in enumerate(sections):
        of_program = names[index].removeprefix(".reltc/")
        if section[1] != _RELOCATIONS or of_program == names[index]:
            continue
        symbols = contents(section[6])
        strings = contents(sections[section[6]][6])
        for offset, what in _RELOCATION.iter_unpack(contents(index)):
            symbol = _SYMBOL.unpack_from(symbols, (what >> 32) * _SYMBOL.size)
            loads = found[of_program]["maps"].setdefault(name_at(strings, symbol[0]), [])
            loads.append(offset // INSTRUCTION_LEN)
    return found


def main() -> None:
    BYTECODE.write_text(json.dumps(compile_source(), indent=1) + "\n")


if __name__ == "__main__":
    main()

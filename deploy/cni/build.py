#!/usr/bin/env python3
"""Link the CNI plugin and a CPython into one static executable: `python3 deploy/cni/build.py OUT`.

Run it with the interpreter whose static library is to be linked: one with its extension modules built in, such as
Debian's (packages gcc, libc6-dev, libpython3-dev). The executable is for the machine's architecture. For another one's
give `--machine` and `--sysroot`, a directory with libpython3-dev of the same version for that architecture; it needs
that architecture's gcc and libc6-dev, and qemu-user to try what it has made.

docs/decisions/0007-the-cni-plugin-on-hosts-without-python.md says why.
"""

from __future__ import annotations

import argparse
import json
import marshal
import os
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_IN_IT = {"__init__", "install"}
"""Modules of udptun/cni that a runtime never asks for."""

MODULE = "udptun.cni.plugin"

LOADED = """\
import sys, _frozen_importlib_external as files
# Python sources only. json does without its accelerator, as it has to in the executable.
sys.path_hooks[:] = [files.FileFinder.path_hook((files.SourceFileLoader, files.SOURCE_SUFFIXES))]
sys.path_importer_cache.clear()
sys.path.append({root!r})
for name in {modules!r}:
    __import__("udptun.cni." + name)
# At its very start the interpreter asks for the codec of the file system's names.
__import__("encodings.utf_8")
import json
# Not under another name as well: os.path is posixpath.
own = (lambda name, module: name in sys.builtin_module_names or module.__name__ == name)
loaded = {{name: module for name, module in sys.modules.items() if own(name, module)}}
print(json.dumps({{name: getattr(module.__spec__, "origin", None) for name, module in loaded.items()}}))
"""

BOOTSTRAP = {"__main__", "_frozen_importlib", "_frozen_importlib_external", "zipimport"}
"""The interpreter has these in a table of its own."""

INIT_FUNCTIONS = {"marshal": "PyMarshal_Init", "_warnings": "_PyWarnings_Init", "builtins": "", "sys": ""}
"""Built-in modules that are not made by PyInit_<name>; those without a function are made by the interpreter itself."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the executable is made for and with; `runner` runs it on this machine."""

    compiler: str
    library: Path
    includes: tuple[Path, ...]
    runner: tuple[str, ...] = ()

    @classmethod
    def of_this_machine(cls) -> Target:
        library = Path(sysconfig.get_config_var("LIBPL"), sysconfig.get_config_var("LIBRARY"))
        paths = sysconfig.get_paths()
        # Debian has the headers that depend on the architecture elsewhere.
        return cls("gcc", library, (Path(paths["include"]), Path(paths["platinclude"])))

    @classmethod
    def of(cls, machine: str, sysroot: Path) -> Target:
        triplet, python = f"{machine}-linux-gnu", f"python{sys.version_info.major}.{sys.version_info.minor}"
        include = sysroot / "usr/include"
        library = sysroot / "usr/lib" / triplet / f"lib{python}.a"
        # One header includes that of the architecture by its path from `include`.
        return cls(f"{triplet}-gcc", library, (include / python, include), (f"qemu-{machine}",))


def main(out: Path, target: Target) -> None:
    """Build `out`, and ask it for its versions."""
    if not target.library.exists():
        sys.exit(f"cannot build {out}: {target.library} is missing; install libpython3-dev, or use another interpreter")
    # Sorted, so that the same sources make the same file.
    origins = dict(sorted(loaded_modules().items()))
    built_in = [name for name in origins if name in sys.builtin_module_names]
    frozen = {name: origins[name] for name in origins if name not in built_in and name not in BOOTSTRAP}
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "plugin.c")
        source.write_text(c_source(built_in, frozen))
        done = subprocess.run(
            [
                *(target.compiler, "-O2", "-s", "-static", "-Wl,--gc-sections", "-o", str(out), str(source)),
                *(f"-I{it}" for it in target.includes),
                *(str(target.library), "-lm"),
            ],
            # The linker warns of getaddrinfo and its like, which want glibc's shared libraries. The plugin has no use
            # for them.
            stderr=subprocess.PIPE,
            text=True,
        )
    if done.returncode != 0:
        sys.exit(f"{done.stderr}cannot build {out}: {target.compiler} ended with status {done.returncode}")
    environ = {"CNI_COMMAND": "VERSION", "PATH": os.environ.get("PATH", os.defpath)}
    subprocess.run([*target.runner, out.resolve()], env=environ, check=True, stdout=subprocess.DEVNULL)
    print(f"{out}: {out.stat().st_size} bytes, Python {sys.version.split()[0]}, {len(frozen)} modules")


def loaded_modules() -> dict[str, str | None]:
    """Every module that is loaded when all of the plugin is, and where it comes from."""
    modules = [path.stem for path in sorted((ROOT / "udptun" / "cni").glob("*.py")) if path.stem not in NOT_IN_IT]
    script = LOADED.format(root=str(ROOT), modules=modules)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1]
        sys.exit(f"cannot build with {sys.executable}: {said}; use one with its modules built in, such as Debian's")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def c_source(built_in: list[str], frozen: dict[str, str | None]) -> str:
    """The program: the interpreter with these modules and no others, and no look at any file."""
    functions = {name: INIT_FUNCTIONS.get(name, f"PyInit_{name}") for name in built_in}
    declared = [f"extern PyObject *{function}(void);" for function in functions.values() if function]
    entries = [f'    {{"{name}", {function or "NULL"}}},' for name, function in functions.items()]
    arrays, table = [], []
    for n, (name, origin) in enumerate(frozen.items()):
        path = source_of(name, origin)
        code = marshal.dumps(compile(path.read_bytes(), f"<{name}>", "exec", optimize=2, dont_inherit=True))
        arrays.append(f"static const unsigned char m{n}[] = {{{','.join(map(str, code))}}};")
        table.append(f'    {{"{name}", m{n}, sizeof m{n}, {int(path.name == "__init__.py")}, 0}},')
    parts = {"declared": declared, "entries": entries, "arrays": arrays, "table": table}
    template = Path(__file__).with_name("plugin.c.in").read_text()
    for name, lines in parts.items():
        template = template.replace(f"/* {name} */", "\n".join(lines))
    return template.replace("/* module */", f'"{MODULE}"')


def source_of(name: str, origin: str | None) -> Path:
    """The module's source, also where the interpreter has it as frozen bytecode."""
    if origin and origin.endswith(".py"):
        return Path(origin)
    base = Path(os.__file__).parent / name.replace(".", "/")
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Link the CNI plugin into one static executable.")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--machine", help="another machine's architecture, as `uname -m` says it there")
    parser.add_argument("--sysroot", type=Path, metavar="DIR", help="where its libpython3-dev is unpacked")
    given = parser.parse_args()
    if (given.machine is None) != (given.sysroot is None):
        parser.error("--machine and --sysroot go together")
    main(given.out, Target.of(given.machine, given.sysroot) if given.machine else Target.of_this_machine())

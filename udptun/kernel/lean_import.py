"""Import a few modules of a large package without what its `__init__` imports besides.

`import a.b` runs the `__init__` of a first.  That of pyroute2 imports all that the library can do: 90 ms and 11 MB, of
which we use a twentieth.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def import_without_init(package: str, *modules: str) -> None:
    """Import `modules`, named from `package` on, and leave the package's `__init__` for later.

    It runs when somebody asks the package for a name that is no module of it, so nobody else in the process sees a
    difference.  Where that does not work with the installed version, all is imported as usual.  Raises ImportError as
    usual, too.
    """
    names = [f"{package}.{module}" for module in modules]
    if not _defer_init(package):
        return
    try:
        for name in names:
            importlib.import_module(name)
    except Exception:
        # A module that needs more than it imports itself.  Begin again, from nothing.
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{package}.")]:
            del sys.modules[name]
        for name in names:
            importlib.import_module(name)


def _defer_init(package: str) -> bool:
    """Put the package into sys.modules with its `__init__` not run yet; False when there is nothing to defer."""
    if package in sys.modules:
        return False
    spec = importlib.util.find_spec(package)
    if spec is None or spec.loader is None:
        return False
    loader = spec.loader
    module = importlib.util.module_from_spec(spec)

    def look_up(name: str) -> object:
        """What the package's `__getattr__` (PEP 562) answers: called for a name that the package does not have."""
        submodule = f"{package}.{name}"
        if importlib.util.find_spec(submodule) is not None:
            return importlib.import_module(submodule)
        # Removed first: while it runs, `__init__` may well ask for what is not there yet.
        del module.__dict__["__getattr__"]
        try:
            loader.exec_module(module)
        except BaseException:
            module.__dict__["__getattr__"] = look_up
            raise
        return getattr(module, name)

    module.__dict__["__getattr__"] = look_up
    sys.modules[package] = module
    return True


@contextmanager
def stand_ins(*modules: ModuleType) -> Iterator[None]:
    """Imports in the block find `modules` in the place of those that have their names and are not loaded yet.

    For what a library imports and we do not use.  A later import by others gets the real ones.
    """
    ours = {module.__name__: module for module in modules if module.__name__ not in sys.modules}
    sys.modules.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del sys.modules[name]
